// Lookup forward for compute capability 9.0: table rows served from shared memory. The design and its expected
// time are in ../cuda.py; tiles, indices and the order of waits and copies in lookup_sm90.h. This file has the
// instructions (PTX ISA: mbarrier, cp.async.bulk, cp.async.bulk.tensor), the launches and the C interface.

#include "lookup_sm90.h"

#include <cuda.h>
#include <cuda_runtime.h>

namespace mf_train {
namespace {

// ---------------------------------------------------------------- one thread's machine

struct Hopper {
    using Address = uint32_t;  // in shared memory
    Address base;
    const CUtensorMap* tables;

    __device__ __forceinline__ Address address(int offset) const { return base + offset; }
    __device__ __forceinline__ Address full(int stage) const { return base + stage * 8; }
    __device__ __forceinline__ Address empty(int stage) const { return base + (MAX_STAGES + stage) * 8; }

    __device__ __forceinline__ static Words load(Address from) {
        Words words;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words.word[0]), "=r"(words.word[1]), "=r"(words.word[2]), "=r"(words.word[3])
                     : "r"(from));
        return words;
    }

    __device__ __forceinline__ int thread() const { return threadIdx.x; }
    __device__ __forceinline__ int cluster_rank() const {
        uint32_t rank;
        asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
        return rank;
    }
    __device__ __forceinline__ int cluster_blocks() const {
        uint32_t blocks;
        asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
        return blocks;
    }

    __device__ __forceinline__ void cluster_sync() const {
        asm volatile(
            "barrier.cluster.arrive.release;\n\t"
            "barrier.cluster.wait.acquire;" ::: "memory");
    }

    // full: the block's own announcement, and the bytes. empty: every warp of every block of the cluster.
    __device__ __forceinline__ void init_barriers(int stages, int warps) const {
        for (int stage = 0; stage < stages; ++stage) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full(stage)) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty(stage)), "r"(warps * cluster_blocks())
                         : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }

    __device__ __forceinline__ static void wait(uint32_t barrier, int parity) {
        asm volatile(
            "{\n\t.reg .pred done;\n"
            "WAIT:\n\t"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
            "@!done bra WAIT;\n\t}" ::"r"(barrier),
            "r"(parity)
            : "memory");
    }
    __device__ __forceinline__ void wait_full(int stage, int parity) const { wait(full(stage), parity); }
    __device__ __forceinline__ void wait_empty(int stage, int parity) const { wait(empty(stage), parity); }

    // Tells every block of the cluster that this warp no longer reads the stage: lane i tells block i.
    __device__ __forceinline__ void release(int stage) const {
        __syncwarp();
        const int lane = threadIdx.x % WARP;
        if (lane < cluster_blocks()) {
            asm volatile(
                "{\n\t.reg .b32 remote;\n\t"
                "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
                "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(empty(stage)),
                "r"(lane)
                : "memory");
        }
    }

    __device__ __forceinline__ void expect(int stage, int bytes) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full(stage)), "r"(bytes)
                     : "memory");
    }

    // A box of the tensor map, whose size it knows, to the same place and barrier in every block of the cluster.
    __device__ __forceinline__ void copy_slice(int stage, int at, int column, int row, int) const {
        const uint32_t to = address(at);
        const int blocks = cluster_blocks();
        if (blocks == 1) {
            asm volatile(
                "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                "l"(tables), "r"(column), "r"(row), "r"(full(stage))
                : "memory");
        } else {
            asm volatile(
                "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                "l"(tables), "r"(column), "r"(row), "r"(full(stage)), "h"(static_cast<uint16_t>((1 << blocks) - 1))
                : "memory");
        }
    }

    __device__ __forceinline__ void copy_entries(int stage, int at, const void* from, int bytes) const {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                address(at)),
            "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(full(stage))
            : "memory");
    }

    __device__ __forceinline__ void store(void* to, const Words& words) const {
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.word[0]),
                     "r"(words.word[1]), "r"(words.word[2]), "r"(words.word[3])
                     : "memory");
    }
};

// ---------------------------------------------------------------- kernels

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1)
    lookup_kernel(const __grid_constant__ CUtensorMap tables, const __grid_constant__ Problem problem) {
    extern __shared__ __align__(1024) char memory[];
    Hopper machine{static_cast<uint32_t>(__cvta_generic_to_shared(memory)), &tables};
    lookup_thread<S>(machine, problem, blockIdx.x, blockIdx.y);
}

template <class Element, class Code>
__global__ void __launch_bounds__(SQUARE * SQUARE_WARPS) pack_kernel(const Packing<Element, Code> packing) {
    __shared__ typename Packing<Element, Code>::Square square;
    packing.read_square(square, blockIdx.x, blockIdx.y, threadIdx.x, threadIdx.y);
    __syncthreads();
    packing.write_square(square, blockIdx.x, blockIdx.y, threadIdx.x, threadIdx.y);
}

// ---------------------------------------------------------------- launches

#define MF_TRY(call)                                   \
    do {                                               \
        const cudaError_t status = (call);             \
        if (status != cudaSuccess) return status;      \
    } while (0)

template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), dim3 grid, dim3 block, int cluster, int shared, cudaStream_t stream,
                   const Arguments&... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

using Encoder = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found through the runtime, so that nothing links libcuda.
cudaError_t find_encoder(Encoder* encoder) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    MF_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
    MF_TRY(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess || function == nullptr) return cudaErrorNotSupported;
    *encoder = reinterpret_cast<Encoder>(function);
    return cudaSuccess;
}

// Tables [K, 2**tau, O] as a matrix of K 2**tau rows; columns past the last one arrive as zeros.
template <class Element>
cudaError_t describe_tables(CUtensorMap* map, const void* tables, const Problem& problem, const Plan& plan) {
    Encoder encode = nullptr;
    MF_TRY(find_encoder(&encode));
    constexpr int VALUE_BYTES = sizeof(typename Element::Value);
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(problem.columns),
                                 static_cast<cuuint64_t>(problem.num_tables) * problem.rows};
    const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(problem.columns) * VALUE_BYTES};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(plan.lanes * LANE_BYTES / VALUE_BYTES),
                               static_cast<cuuint32_t>(problem.share < MAX_BOX_ROWS ? problem.share : MAX_BOX_ROWS)};
    const cuuint32_t steps[2] = {1, 1};
    const CUresult status = encode(
        map, VALUE_BYTES == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2,
        const_cast<void*>(tables), sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return static_cast<cudaError_t>(status);  // the driver's and the runtime's codes agree
}

template <class S>
cudaError_t launch_lookup(const void* tables, const Problem& problem, const Plan& plan, cudaStream_t stream) {
    using Element = typename S::Element;
    CUtensorMap map;
    MF_TRY(describe_tables<Element>(&map, tables, problem, plan));
    const int shared = shared_bytes(plan, problem.rows, sizeof(typename Element::Entry));
    MF_TRY(cudaFuncSetAttribute(lookup_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    const int64_t tiles = (problem.tokens + S::TILE - 1) / S::TILE;
    const int64_t blocks = (tiles + plan.cluster - 1) / plan.cluster * plan.cluster;
    const int64_t column_blocks = (problem.columns + S::COLUMNS - 1) / S::COLUMNS;
    if (blocks > INT32_MAX || column_blocks > 65535) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(column_blocks));
    return launch(lookup_kernel<S>, grid, dim3(S::THREADS), plan.cluster, shared, stream, map, problem);
}

template <class Element, int LANES>
cudaError_t choose_passes(const void* tables, const Problem& problem, const Plan& plan, cudaStream_t stream) {
    switch (plan.passes) {
        case 4: return launch_lookup<Shape<Element, LANES, 4, PLAN_WARPS>>(tables, problem, plan, stream);
        case 8: return launch_lookup<Shape<Element, LANES, 8, PLAN_WARPS>>(tables, problem, plan, stream);
        case 16: return launch_lookup<Shape<Element, LANES, 16, PLAN_WARPS>>(tables, problem, plan, stream);
        default: return cudaErrorInvalidValue;
    }
}

template <class Element>
cudaError_t lookup(const void* entries, const void* tables, void* y, int64_t tokens, int64_t num_tables, int bits,
                   int64_t columns, int device, cudaStream_t stream) {
    int multiprocessors = 0;
    MF_TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    const Plan plan = make_plan(tokens, columns, bits, sizeof(typename Element::Value), multiprocessors);
    const int rows = 1 << bits;
    const Problem problem{tokens, padded_tokens(tokens), columns,     static_cast<int>(num_tables),
                          rows,   rows / plan.cluster,   plan.stages, entries, y};
    return plan.lanes == 8 ? choose_passes<Element, 8>(tables, problem, plan, stream)
                           : choose_passes<Element, 4>(tables, problem, plan, stream);
}

template <class Element, class Code>
cudaError_t pack(const void* codes, const void* weights, void* entries, int64_t tokens, int64_t num_tables, int bits,
                 cudaStream_t stream) {
    const int64_t padded = padded_tokens(tokens);
    const int64_t across = padded / SQUARE, down = (num_tables + SQUARE - 1) / SQUARE;
    if (across > INT32_MAX || down > 65535) return cudaErrorInvalidValue;
    const Packing<Element, Code> packing{static_cast<const Code*>(codes),
                                         static_cast<const typename Element::Value*>(weights),
                                         static_cast<typename Element::Entry*>(entries),
                                         tokens,
                                         padded,
                                         static_cast<int>(num_tables),
                                         1 << bits,
                                         lanes_of_row(bits) * LANE_BYTES};
    const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
    return launch(pack_kernel<Element, Code>, grid, dim3(SQUARE, SQUARE_WARPS), 1, 0, stream, packing);
}

template <class Element>
cudaError_t choose_code(const void* codes, int code_bytes, const void* weights, void* entries, int64_t tokens,
                        int64_t num_tables, int bits, cudaStream_t stream) {
    switch (code_bytes) {
        case 1: return pack<Element, uint8_t>(codes, weights, entries, tokens, num_tables, bits, stream);
        case 2: return pack<Element, int16_t>(codes, weights, entries, tokens, num_tables, bits, stream);
        case 4: return pack<Element, int32_t>(codes, weights, entries, tokens, num_tables, bits, stream);
        case 8: return pack<Element, int64_t>(codes, weights, entries, tokens, num_tables, bits, stream);
        default: return cudaErrorInvalidValue;
    }
}

bool sizes_fit(int64_t tokens, int64_t num_tables, int bits, int value_bytes) {
    return tokens >= 0 && num_tables >= 1 && bits >= 1 && bits <= MAX_BITS && num_tables <= INT32_MAX >> bits &&
           (value_bytes == 2 || value_bytes == 4);
}

}  // namespace
}  // namespace mf_train

// ---------------------------------------------------------------- C interface; each returns a cudaError_t's number

using namespace mf_train;

// Bytes of the entries that `mf_lookup_sm90_pack` writes, for values of 2 (bfloat16) or 4 (float32) bytes.
extern "C" int64_t mf_lookup_sm90_entry_bytes(int64_t tokens, int64_t num_tables, int value_bytes) {
    return padded_tokens(tokens) * num_tables * (value_bytes == 2 ? 4 : 8);
}

// Codes [N, K] of 1 (unsigned), 2, 4 or 8 (signed) bytes and weights [N, K] in the tables' type, as entries.
extern "C" int mf_lookup_sm90_pack(const void* codes, int code_bytes, const void* weights, int value_bytes,
                                   void* entries, int64_t tokens, int64_t num_tables, int bits, int device,
                                   void* stream) {
    if (!sizes_fit(tokens, num_tables, bits, value_bytes)) return cudaErrorInvalidValue;
    if (tokens == 0) return cudaSuccess;
    MF_TRY(cudaSetDevice(device));
    const auto on = static_cast<cudaStream_t>(stream);
    return value_bytes == 2
               ? choose_code<BFloat16>(codes, code_bytes, weights, entries, tokens, num_tables, bits, on)
               : choose_code<Float32>(codes, code_bytes, weights, entries, tokens, num_tables, bits, on);
}

// y [N, O] of entries and tables [K, 2**tau, O]; tables and y start at a multiple of 16 bytes, as does each row.
extern "C" int mf_lookup_sm90(const void* entries, const void* tables, int value_bytes, void* y, int64_t tokens,
                              int64_t num_tables, int bits, int64_t columns, int device, void* stream) {
    if (!sizes_fit(tokens, num_tables, bits, value_bytes) || columns < 1 || columns > INT32_MAX ||
        columns * value_bytes % LANE_BYTES != 0) {
        return cudaErrorInvalidValue;
    }
    const auto addresses = reinterpret_cast<uintptr_t>(tables) | reinterpret_cast<uintptr_t>(y) |
                           reinterpret_cast<uintptr_t>(entries);
    if (addresses % LANE_BYTES != 0) return cudaErrorMisalignedAddress;
    if (tokens == 0) return cudaSuccess;
    MF_TRY(cudaSetDevice(device));
    const auto on = static_cast<cudaStream_t>(stream);
    return value_bytes == 2
               ? lookup<BFloat16>(entries, tables, y, tokens, num_tables, bits, columns, device, on)
               : lookup<Float32>(entries, tables, y, tokens, num_tables, bits, columns, device, on);
}

extern "C" const char* mf_lookup_sm90_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
