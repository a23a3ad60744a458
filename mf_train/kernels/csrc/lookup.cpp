// Lookup forward (Eq. 11): y = sum over k of weight_k * table_k[code_k], for several table sets that share codes and
// weights. Every column is its own sum over k, in order, with one fused multiply-add a term in float32 and one rounding
// at the end, whatever the blocks and threads are.

#include <omp.h>

#include "operation.h"

namespace mf {
namespace {

// A read of a row: which, and times what.
struct Read {
    int32_t code;
    float weight;
};

template <typename Table, typename Code, typename Weight>
void make_reads(const Code* codes, const Weight* weights, const float* scales, const Shape& shape, Read* reads,
                int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t token = 0; token < shape.tokens; ++token) {
        for (int64_t k = 0; k < shape.tables; ++k) {
            const int64_t i = token * shape.tables + k;
            const float weight = rounded_weight<Table>(weights[i]);
            const float scale = scales ? scales[k * shape.rows + int64_t(codes[i])] : 1.0f;
            reads[i] = {int32_t(codes[i]), weight * scale};
        }
    }
}

// --- Few tokens: each row that is hit comes once from memory, so the next ones are asked for early.

// 8 vectors of sums in registers, so 128 columns: pieces of rows long enough for the memory's pages.
constexpr int kDirectColumns = 8 * kLanes;
// Rows asked for ahead: more than a core has open requests for.
constexpr int64_t kRowsAhead = 8;

// One token's sums of Vecs * 16 columns, the last vector cut to `last` lanes. The first `ahead` columns of the rows that
// follow are asked for.
template <int Vecs, typename T, typename Y>
inline void sum_rows(const Read* reads, const Shape& shape, const T* tables, int64_t columns, int last, int64_t ahead,
                     Y* y) {
    const int64_t table_size = shape.rows * columns;
    const int64_t line = kCacheLine / int64_t(sizeof(T));
    Vec sums[Vecs];
    for (int v = 0; v < Vecs; ++v) sums[v] = zero();
    for (int64_t k = 0; k < shape.tables; ++k) {
        if (k + kRowsAhead < shape.tables) {
            const T* next = tables + (k + kRowsAhead) * table_size + reads[k + kRowsAhead].code * columns;
            for (int64_t c = 0; c < ahead; c += line) {
                __builtin_prefetch(next + c);
            }
        }
        const T* row = tables + k * table_size + reads[k].code * columns;
        const Vec weight = broadcast(reads[k].weight);
        for (int v = 0; v < Vecs; ++v) {
            sums[v] = fma(weight, load_lanes(row + v * kLanes, v < Vecs - 1 ? kLanes : last), sums[v]);
        }
    }
    for (int v = 0; v < Vecs; ++v) store_lanes(y + v * kLanes, sums[v], v < Vecs - 1 ? kLanes : last);
}

// A token's rows are read from end to end before the next token's, or in as many parts as there are threads: a row's
// first block of columns brings the whole row into L2, at one miss of the TLB instead of one a block.
template <typename T, typename Y>
void lookup_directly(const Read* reads, const Shape& shape, const T* tables, int64_t columns, Y* y, int threads) {
    const int64_t blocks = ceil_div(columns, kDirectColumns);
    const int64_t parts = shape.tokens >= threads ? 1 : min(threads, blocks);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t token = 0; token < shape.tokens; ++token) {
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t begin = part * blocks / parts, end = (part + 1) * blocks / parts;
            for (int64_t block = begin; block < end; ++block) {
                const int64_t first = block * kDirectColumns;
                const int width = int(min(kDirectColumns, columns - first));
                const int64_t ahead = block == begin ? min(end * kDirectColumns, columns) - first : 0;
                with_vecs(int(ceil_div(width, kLanes)), [&](auto vecs) {
                    const int last = width - (vecs.value - 1) * kLanes;
                    sum_rows<vecs.value>(reads + token * shape.tables, shape, tables + first, columns, last, ahead,
                                         y + token * columns + first);
                });
            }
        }
    }
}

// --- Many tokens: rows are hit again and again, so columns of a few tables are copied to where they stay in L2.

// Columns of a tile: 4 vectors, one multiply-add chain each, which is what covers the instruction's latency. Wider
// tiles hold fewer tables, and the sums then travel between registers and memory more often.
constexpr int kTileVecs = 4;
constexpr int kTileColumns = kTileVecs * kLanes;
// An eighth of a 2 MiB L2: the source of the copy, the sums and the reads pass through the same cache. 256 KiB measured
// faster than 512 KiB and 1 MiB.
constexpr int64_t kTileBytes = 256 * 1024;
// Tokens whose sums a thread holds in memory meanwhile (1 MiB).
constexpr int64_t kTileTokens = 4096;
// Rows asked for ahead of their copy.
constexpr int64_t kTileRowsAhead = 16;
// Copying a tile pays when each of its rows is hit about this often.
constexpr int64_t kHitsPerRow = 2;

// Columns [first, first + width) of `rows` rows, contiguous. In place they would lie a power of two apart and share few
// of the cache's sets.
template <int Vecs, typename T>
void copy_tile(const T* table, int64_t rows, int64_t columns, int width, T* tile) {
    constexpr int kWidth = Vecs * kLanes;
    for (int64_t r = 0; r < rows; ++r) {
        if (r + kTileRowsAhead < rows) {
            const char* ahead = reinterpret_cast<const char*>(table + (r + kTileRowsAhead) * columns);
            for (int64_t b = 0; b < int64_t(kWidth * sizeof(T)); b += kCacheLine) __builtin_prefetch(ahead + b);
        }
        if (width == kWidth) {
            std::memcpy(tile + r * kWidth, table + r * columns, kWidth * sizeof(T));
        } else {
            for (int c = 0; c < width; ++c) tile[r * kWidth + c] = table[r * columns + c];
            for (int c = width; c < kWidth; ++c) tile[r * kWidth + c] = T{};
        }
    }
}

// Adds one token's rows of the tile's `count` tables to its sums.
template <int Vecs, typename T>
inline void add_rows(const Read* reads, int64_t count, const T* tile, int64_t rows, Vec* sums) {
    for (int64_t k = 0; k < count; ++k) {
        const T* row = tile + (k * rows + reads[k].code) * (Vecs * kLanes);
        const Vec weight = broadcast(reads[k].weight);
        for (int v = 0; v < Vecs; ++v) sums[v] = fma(weight, load(row + v * kLanes), sums[v]);
    }
}

// Columns [first, first + width) of tokens [begin, end).
template <int Vecs, typename T, typename Y>
void sum_tiles(const Read* reads, const Shape& shape, const T* tables, int64_t columns, int64_t first, int width,
               int64_t begin, int64_t end, T* tile, float* sums_in_memory, Y* y) {
    constexpr int kWidth = Vecs * kLanes;
    const int last = width - (Vecs - 1) * kLanes;
    const int64_t group = kTileBytes / (shape.rows * kTileColumns * int64_t(sizeof(T)));
    for (int64_t k = 0; k < shape.tables; k += group) {
        const int64_t count = min(group, shape.tables - k);
        copy_tile<Vecs>(tables + k * shape.rows * columns + first, count * shape.rows, columns, width, tile);
        for (int64_t token = begin; token < end; ++token) {
            float* held = sums_in_memory + (token - begin) * kWidth;
            Vec sums[Vecs];
            for (int v = 0; v < Vecs; ++v) sums[v] = k == 0 ? zero() : load(held + v * kLanes);
            add_rows<Vecs>(reads + token * shape.tables + k, count, tile, shape.rows, sums);
            if (k + count < shape.tables) {
                for (int v = 0; v < Vecs; ++v) store(held + v * kLanes, sums[v]);
            } else {
                Y* out = y + token * columns + first;
                for (int v = 0; v < Vecs; ++v) store_lanes(out + v * kLanes, sums[v], v < Vecs - 1 ? kLanes : last);
            }
        }
    }
}

template <typename T, typename Y>
int32_t lookup_by_tiles(const Read* reads, const Shape& shape, const T* tables, int64_t columns, Y* y, int threads) {
    const int64_t blocks = ceil_div(columns, kTileColumns);
    const int64_t parts = max(ceil_div(shape.tokens, kTileTokens), ceil_div(threads, blocks));
    const int64_t part_tokens = ceil_div(shape.tokens, parts);
    const int64_t tile_size = kTileBytes / int64_t(sizeof(T));
    Buffer<T> tiles(threads * tile_size);
    Buffer<float> sums(threads * part_tokens * kTileColumns);
    if (!tiles.ok() || !sums.ok()) return kNoMemory;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = block * kTileColumns;
            const int width = int(min(kTileColumns, columns - first));
            const int64_t begin = min(part * part_tokens, shape.tokens);
            const int64_t end = min(begin + part_tokens, shape.tokens);
            const int64_t thread = omp_get_thread_num();
            with_vecs(int(ceil_div(width, kLanes)), [&](auto vecs) {
                sum_tiles<vecs.value>(reads, shape, tables, columns, first, width, begin, end,
                                      tiles.get() + thread * tile_size,
                                      sums.get() + thread * part_tokens * kTileColumns, y);
            });
        }
    }
    return kDone;
}

// --- The choice, and one table set after the other.

template <typename T, typename Y>
int32_t lookup_set(const Read* reads, const Shape& shape, const T* tables, int64_t columns, Y* y, int threads) {
    threads = useful_threads(threads, shape.reads() * columns * int64_t(sizeof(T)));
    const bool fits = shape.rows * kTileColumns * int64_t(sizeof(T)) <= kTileBytes;
    if (fits && shape.tokens >= kHitsPerRow * shape.rows) {
        return lookup_by_tiles(reads, shape, tables, columns, y, threads);
    }
    lookup_directly(reads, shape, tables, columns, y, threads);
    return kDone;
}

template <typename T, typename Code, typename Weight>
int32_t lookup_sets(const Code* codes, const Weight* weights, const Shape& shape, int32_t sets,
                    const void* const* table_sets, const int64_t* columns, void* const* ys, int threads) {
    Buffer<Read> reads(shape.reads());
    if (!reads.ok()) return kNoMemory;
    make_reads<T>(codes, weights, nullptr, shape, reads.get(), useful_threads(threads, shape.reads() * 16));
    for (int32_t set = 0; set < sets; ++set) {
        const int32_t status = lookup_set(reads.get(), shape, static_cast<const T*>(table_sets[set]), columns[set],
                                          static_cast<T*>(ys[set]), threads);
        if (status != kDone) return status;
    }
    return kDone;
}

}  // namespace
}  // namespace mf

// codes and weights [tokens, tables]; of each of `sets` sets: tables [tables, rows, columns[i]] and y [tokens,
// columns[i]], both of table_type.
extern "C" int32_t mf_lookup(const void* codes, int32_t code_type, const void* weights, int32_t weight_type,
                             int64_t tokens, int64_t tables, int64_t rows, int32_t sets, const void* const* table_sets,
                             const int64_t* columns, int32_t table_type, void* const* ys, int32_t threads) {
    using namespace mf;
    const Shape shape{tokens, tables, rows};
    return with_codes(code_type, codes, [&](auto* codes) -> int32_t {
        if (!in_range(codes, shape.reads(), rows)) return kCodeOutOfRange;
        return with_floats(weight_type, weights, [&](auto* weights) -> int32_t {
            return table_type == kFloat32
                       ? lookup_sets<float>(codes, weights, shape, sets, table_sets, columns, ys, threads)
                       : lookup_sets<bf16>(codes, weights, shape, sets, table_sets, columns, ys, threads);
        });
    });
}

// y = sum over k of (weight_k * scale_k[code_k]) * table_k[code_k]: tables int8 [tables, rows, columns], scales float32
// [tables, rows]; y in the weights' type.
extern "C" int32_t mf_lookup_int8(const void* codes, int32_t code_type, const void* weights, int32_t weight_type,
                                  int64_t tokens, int64_t tables, int64_t rows, const int8_t* table_set,
                                  int64_t columns, const float* scales, void* y, int32_t threads) {
    using namespace mf;
    const Shape shape{tokens, tables, rows};
    return with_codes(code_type, codes, [&](auto* codes) -> int32_t {
        if (!in_range(codes, shape.reads(), rows)) return kCodeOutOfRange;
        Buffer<Read> reads(shape.reads());
        if (!reads.ok()) return kNoMemory;
        return with_floats(weight_type, weights, [&](auto* weights) -> int32_t {
            using Y = std::remove_const_t<std::remove_pointer_t<decltype(weights)>>;
            const int readers = useful_threads(threads, shape.reads() * 16);
            make_reads<int8_t>(codes, weights, scales, shape, reads.get(), readers);
            return lookup_set(reads.get(), shape, table_set, columns, static_cast<Y*>(y), threads);
        });
    });
}
