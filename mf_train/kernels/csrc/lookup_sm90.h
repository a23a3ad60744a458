// The lookup kernel of lookup_sm90.cu without the machine: tiles, indices, the pipeline's order of waits and copies.
//
// Nothing here names a CUDA instruction. `lookup_thread` is what one thread of the kernel does, on a Machine that
// supplies barriers, copies and thread numbers: PTX in lookup_sm90.cu, and threads of a CPU in
// tests/kernels/lookup_sm90_emulation.cpp, where this same code runs under ThreadSanitizer and AddressSanitizer.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define MF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#include <cmath>
#define MF_HOST_DEVICE inline
#endif

#ifdef __CUDA_ARCH__
#define MF_UNROLL _Pragma("unroll")
#else
#define MF_UNROLL
#endif

namespace mf_train {

constexpr int WARP = 32;
constexpr int LANE_BYTES = 16;            // one shared-memory load of one lane
constexpr int ALIGNMENT = 128;            // of a bulk tensor copy's destination
constexpr int MAX_BITS = 10;              // tau; the slice of a larger table does not fit twice
constexpr int MAX_STAGES = 8;
constexpr int MAX_BOX_ROWS = 256;         // of one bulk tensor copy
constexpr int BARRIER_BYTES = 2 * MAX_STAGES * sizeof(uint64_t);  // full and empty, one pair a stage
constexpr int MAX_SHARED_BYTES = 227 * 1024;
constexpr int TOKEN_PADDING = 1536;       // every tile's size divides it

struct alignas(LANE_BYTES) Words {
    uint32_t word[4];
};

MF_HOST_DEVICE float float_of(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

MF_HOST_DEVICE uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

// An entry is what the kernel needs of one (token, table): the row's byte offset in the slice, and the weight.
// A code outside the table becomes row 0 with a NaN for its weight, so that nothing outside is ever read.

struct BFloat16 {
    using Value = uint16_t;
    using Entry = uint32_t;  // offset in the upper half (a slice has at most 64 KiB), weight in the lower
    static constexpr int COLUMNS_PER_LANE = 8;
    static constexpr int ENTRIES_PER_LOAD = 4;
    static constexpr Value NOT_A_NUMBER = 0x7fc0;

    static MF_HOST_DEVICE Entry entry(uint32_t offset, Value weight) {
        return offset << 16 | weight;
    }
    static MF_HOST_DEVICE uint32_t offset(const Words& entries, int i) { return entries.word[i] >> 16; }
    static MF_HOST_DEVICE float weight(const Words& entries, int i) {
        return float_of(entries.word[i] << 16);
    }
    // A product of two bf16 values is exact in float32, so each step rounds once, as a sum of products does.
    static MF_HOST_DEVICE void add(float (&sums)[COLUMNS_PER_LANE], float weight, const Words& row) {
        MF_UNROLL
        for (int i = 0; i < 4; ++i) {
            sums[2 * i] = fmaf(weight, float_of(row.word[i] << 16), sums[2 * i]);
            sums[2 * i + 1] = fmaf(weight, float_of(row.word[i] & 0xffff0000u), sums[2 * i + 1]);
        }
    }
    static MF_HOST_DEVICE uint32_t rounded(float low, float high) {  // to nearest, ties to even
#ifdef __CUDA_ARCH__
        uint32_t pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
#else
        uint32_t half[2];
        const float values[2] = {low, high};
        for (int i = 0; i < 2; ++i) {
            const uint32_t bits = bits_of(values[i]);
            half[i] = values[i] != values[i] ? NOT_A_NUMBER : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
        }
        return half[0] | half[1] << 16;
#endif
    }
    static MF_HOST_DEVICE Words result(const float (&sums)[COLUMNS_PER_LANE]) {
        Words words;
        MF_UNROLL
        for (int i = 0; i < 4; ++i) words.word[i] = rounded(sums[2 * i], sums[2 * i + 1]);
        return words;
    }
};

struct Float32 {
    using Value = float;
    struct alignas(8) Entry {
        uint32_t offset;
        float weight;
    };
    static constexpr int COLUMNS_PER_LANE = 4;
    static constexpr int ENTRIES_PER_LOAD = 2;
    static constexpr Value NOT_A_NUMBER = __builtin_nanf("");

    static MF_HOST_DEVICE Entry entry(uint32_t offset, Value weight) { return {offset, weight}; }
    static MF_HOST_DEVICE uint32_t offset(const Words& entries, int i) { return entries.word[2 * i]; }
    static MF_HOST_DEVICE float weight(const Words& entries, int i) { return float_of(entries.word[2 * i + 1]); }
    static MF_HOST_DEVICE void add(float (&sums)[COLUMNS_PER_LANE], float weight, const Words& row) {
        MF_UNROLL
        for (int i = 0; i < 4; ++i) sums[i] = fmaf(weight, float_of(row.word[i]), sums[i]);
    }
    static MF_HOST_DEVICE Words result(const float (&sums)[COLUMNS_PER_LANE]) {
        Words words;
        MF_UNROLL
        for (int i = 0; i < 4; ++i) words.word[i] = bits_of(sums[i]);
        return words;
    }
};

template <class Element>
MF_HOST_DEVICE typename Element::Entry make_entry(
    int64_t code, typename Element::Value weight, int rows, int row_bytes) {
    const bool inside = code >= 0 && code < rows;
    return Element::entry(
        inside ? static_cast<uint32_t>(code) * row_bytes : 0, inside ? weight : Element::NOT_A_NUMBER);
}

// Codes and weights [N, K] to entries [K, padded N], by thread blocks of SQUARE x SQUARE_WARPS threads: each turns a
// square of 32 tokens and tables in shared memory, `read_square` before a barrier and `write_square` after it.
constexpr int SQUARE = 32, SQUARE_WARPS = 8;

template <class Element, class Code>
struct Packing {
    using Entry = typename Element::Entry;
    using Square = Entry[SQUARE][SQUARE + 1];
    const Code* codes;
    const typename Element::Value* weights;
    Entry* entries;
    int64_t tokens, padded_tokens;
    int num_tables, rows, row_bytes;

    MF_HOST_DEVICE void read_square(Square& square, int64_t block_x, int block_y, int lane, int warp) const {
        const int table = block_y * SQUARE + lane;
        for (int i = warp; i < SQUARE; i += SQUARE_WARPS) {
            const int64_t token = block_x * SQUARE + i;
            square[i][lane] = Element::entry(0, 0);  // of the tokens that pad the last tile
            if (token < tokens && table < num_tables) {
                const int64_t at = token * num_tables + table;
                square[i][lane] = make_entry<Element>(codes[at], weights[at], rows, row_bytes);
            }
        }
    }
    MF_HOST_DEVICE void write_square(const Square& square, int64_t block_x, int block_y, int lane, int warp) const {
        for (int i = warp; i < SQUARE && block_y * SQUARE + i < num_tables; i += SQUARE_WARPS) {
            entries[(block_y * SQUARE + i) * padded_tokens + block_x * SQUARE + lane] = square[lane][i];
        }
    }
};

// What one thread block does: LANES lanes hold a row segment of a token, 16 bytes each; a thread does this for
// PASSES tokens, whose sums stay in its registers. A tile is the tokens of a block, a slice 2**tau row segments.
template <class Element_, int LANES_, int PASSES_, int WARPS_>
struct Shape {
    using Element = Element_;
    static constexpr int LANES = LANES_, PASSES = PASSES_, WARPS = WARPS_;
    static constexpr int THREADS = WARPS * WARP;
    static constexpr int GROUPS = THREADS / LANES;
    static constexpr int TILE = GROUPS * PASSES;
    static constexpr int ROW_BYTES = LANES * LANE_BYTES;
    static constexpr int COLUMNS = LANES * Element::COLUMNS_PER_LANE;
    static constexpr int TILE_BYTES = TILE * static_cast<int>(sizeof(typename Element::Entry));
    static constexpr int LOADS = PASSES / Element::ENTRIES_PER_LOAD;
    static_assert(PASSES % Element::ENTRIES_PER_LOAD == 0 && TILE_BYTES % ALIGNMENT == 0);

    // The token, within the tile, of a group's pass: entries lie in the order of tokens, and one 16-byte load
    // gives a group those of its next passes; the groups of a warp read neighbours.
    static MF_HOST_DEVICE int token(int group, int pass) {
        return (pass / Element::ENTRIES_PER_LOAD * GROUPS + group) * Element::ENTRIES_PER_LOAD +
               pass % Element::ENTRIES_PER_LOAD;
    }
};

struct Problem {
    int64_t tokens;         // N
    int64_t padded_tokens;  // a multiple of TOKEN_PADDING
    int64_t columns;        // O, of which a row's bytes are a multiple of 16
    int num_tables;         // K
    int rows;               // 2**tau
    int share;              // of a slice's rows that each block of a cluster fetches
    int stages;             // of the pipeline
    const void* entries;    // [K, padded_tokens]
    void* y;                // [N, O]
};

MF_HOST_DEVICE int64_t padded_tokens(int64_t tokens) {
    return (tokens + TOKEN_PADDING - 1) / TOKEN_PADDING * TOKEN_PADDING;
}

// Tables before the present one whose stage is not refilled yet: the warp that refills should not have to wait for
// the others to finish the table that it has just finished itself.
MF_HOST_DEVICE int refill_lag(int stages) { return (stages - 1) / 2; }

// Asks for table k's slice and entries. The blocks of a cluster have different tokens and the same columns: each
// fetches its share of the slice's rows, once, for all of them.
template <class S, class Machine>
MF_HOST_DEVICE void fill(Machine& machine, const Problem& problem, int k, int stage, int64_t tile, int64_t column) {
    const int slice_bytes = problem.rows * S::ROW_BYTES;
    const int at = BARRIER_BYTES + stage * (slice_bytes + S::TILE_BYTES);
    machine.expect(stage, slice_bytes + S::TILE_BYTES);

    const int box = problem.share < MAX_BOX_ROWS ? problem.share : MAX_BOX_ROWS;
    const int first = machine.cluster_rank() * problem.share;
    for (int row = first; row < first + problem.share; row += box) {
        machine.copy_slice(
            stage, at + row * S::ROW_BYTES, static_cast<int>(column), k * problem.rows + row, box * S::ROW_BYTES);
    }
    using Entry = typename S::Element::Entry;
    const Entry* entries = static_cast<const Entry*>(problem.entries) + k * problem.padded_tokens + tile * S::TILE;
    machine.copy_entries(stage, at + slice_bytes, entries, S::TILE_BYTES);
}

// `row` is the address of this lane's part of the slice's row 0, `entries` that of the group's first entries.
template <class S, class Machine>
MF_HOST_DEVICE void gather(
    float (&sums)[S::PASSES][S::Element::COLUMNS_PER_LANE], const Machine& machine, typename Machine::Address row,
    typename Machine::Address entries) {
    using Element = typename S::Element;
    MF_UNROLL
    for (int load = 0; load < S::LOADS; ++load) {
        const Words some = machine.load(entries + load * S::GROUPS * LANE_BYTES);
        MF_UNROLL
        for (int i = 0; i < Element::ENTRIES_PER_LOAD; ++i) {
            const Words values = machine.load(row + Element::offset(some, i));
            Element::add(sums[load * Element::ENTRIES_PER_LOAD + i], Element::weight(some, i), values);
        }
    }
}

// One thread of the kernel. Block (block_x, block_y) has the tokens of tile block_x and the columns of block_y.
template <class S, class Machine>
MF_HOST_DEVICE void lookup_thread(Machine& machine, const Problem& problem, int64_t block_x, int64_t block_y) {
    using Element = typename S::Element;
    const int thread = machine.thread();
    const int group = thread / S::LANES;
    const int lane = thread % S::LANES;
    const int stages = problem.stages;
    const int slice_bytes = problem.rows * S::ROW_BYTES;
    const int stage_bytes = slice_bytes + S::TILE_BYTES;
    const int64_t column = block_y * S::COLUMNS;
    // The last cluster may have more blocks than there are tiles; they fetch their share and store nothing.
    const int64_t last_tile = problem.padded_tokens / S::TILE - 1;
    const int64_t tile = block_x < last_tile ? block_x : last_tile;

    if (thread == 0) machine.init_barriers(stages, S::WARPS);
    machine.cluster_sync();
    if (thread == 0) {
        for (int k = 0; k < stages && k < problem.num_tables; ++k) fill<S>(machine, problem, k, k, tile, column);
    }

    float sums[S::PASSES][Element::COLUMNS_PER_LANE] = {};
    int stage = 0, parity = 0, turn = 0;
    for (int k = 0; k < problem.num_tables; ++k) {
        machine.wait_full(stage, parity);
        const auto slice = machine.address(BARRIER_BYTES + stage * stage_bytes);
        gather<S>(sums, machine, slice + lane * LANE_BYTES, slice + slice_bytes + group * LANE_BYTES);
        machine.release(stage);
        if (++stage == stages) stage = 0, parity ^= 1;

        if (thread == turn) {  // one lane of each warp, by turns
            const int done = k - refill_lag(stages);
            if (done >= 0 && done + stages < problem.num_tables) {
                machine.wait_empty(done % stages, done / stages & 1);
                fill<S>(machine, problem, done + stages, done % stages, tile, column);
            }
        }
        turn = turn == S::THREADS - WARP ? 0 : turn + WARP;
    }

    const int64_t lane_column = column + lane * Element::COLUMNS_PER_LANE;
    typename Element::Value* y = static_cast<typename Element::Value*>(problem.y);
    if (lane_column < problem.columns) {
        MF_UNROLL
        for (int pass = 0; pass < S::PASSES; ++pass) {
            const int64_t token = block_x * S::TILE + S::token(group, pass);
            if (token < problem.tokens) {
                machine.store(y + token * problem.columns + lane_column, Element::result(sums[pass]));
            }
        }
    }
    machine.cluster_sync();  // a block's memory and barriers must outlive what its neighbours send there
}

// How a problem is cut: found by the clocks that the slowest part of each choice would take.
struct Plan {
    int lanes, passes, cluster, stages;
};

constexpr int PLAN_WARPS = 12;  // 384 threads: 168 registers each, of which 128 hold sums at 16 passes

// 64-byte rows instead of 128 where two slices would not fit: 10 bits.
inline int lanes_of_row(int bits) { return bits == MAX_BITS ? 4 : 8; }

inline int tile_tokens(int lanes, int passes) { return PLAN_WARPS * WARP / lanes * passes; }

inline int shared_bytes(const Plan& plan, int rows, int entry_bytes) {
    const int stage = rows * plan.lanes * LANE_BYTES + tile_tokens(plan.lanes, plan.passes) * entry_bytes;
    return BARRIER_BYTES + plan.stages * stage;
}

inline int stages_that_fit(int lanes, int passes, int rows, int entry_bytes) {
    Plan plan{lanes, passes, 1, MAX_STAGES};
    while (shared_bytes(plan, rows, entry_bytes) > MAX_SHARED_BYTES) --plan.stages;
    return plan.stages;
}

inline Plan make_plan(int64_t tokens, int64_t columns, int bits, int element_bytes, int multiprocessors) {
    // Expected, not measured (../cuda.py has the counts). Clocks of a multiprocessor for a 128-byte row: to issue the
    // gather's instructions, to read it from shared memory, to write it there; and bytes a clock from L2.
    const double issue_row = 1.4, read_row = 1.1, write_row = 1.0, l2_of_all = 3100, l2_of_one = 64;
    const int rows = 1 << bits;
    const int lanes = lanes_of_row(bits);
    const int row_bytes = lanes * LANE_BYTES;
    const int64_t column_blocks = (columns * element_bytes + row_bytes - 1) / row_bytes;
    const int entry_bytes = element_bytes == 2 ? 4 : 8;
    Plan best{};
    double least = 0;
    for (int passes = 16; passes >= 4; passes /= 2) {
        for (int cluster = 1; cluster <= 4 && cluster <= rows; cluster *= 2) {
            const int tile = tile_tokens(lanes, passes);
            const int64_t tiles = (tokens + tile - 1) / tile;
            const int64_t blocks = (tiles + cluster - 1) / cluster * cluster * column_blocks;
            const int64_t at_once = multiprocessors / cluster * cluster;
            const int64_t waves = (blocks + at_once - 1) / at_once;
            const double part = row_bytes / 128.0;
            const double issue = tile * issue_row * part;
            const double conflicts = lanes == 8 ? 1 : 1.5;  // two 64-byte rows in one access, of random banks
            const double shared = (tile * read_row * conflicts + rows * write_row) * part;
            const double l2 = std::min(l2_of_one, l2_of_all / static_cast<double>(std::min(blocks, at_once)));
            const double load = static_cast<double>(rows) * row_bytes / cluster / l2;
            const double clocks = static_cast<double>(waves) * std::max({issue, shared, load});
            if (best.lanes == 0 || clocks < least) {
                least = clocks;
                best = Plan{lanes, passes, cluster, stages_that_fit(lanes, passes, rows, entry_bytes)};
            }
        }
    }
    return best;
}

}  // namespace mf_train
