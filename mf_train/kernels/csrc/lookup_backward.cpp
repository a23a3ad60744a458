// Lookup backward: d weight = <dy, row> and d row = sum of weight * dy over the row's readers, in one pass over dy.
//
// A stable counting sort groups the tokens of each table by code, so one thread owns a row: it holds the row and its
// gradient in registers and reads dy of its tokens, in order, once for both. No atomics; a row's gradient is written
// once, zeros for a row that nobody read. The same bits in every run and for any number of threads.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "operation.h"

namespace mf {
namespace {

// Columns of one pass over all tables: 8 vectors of row and 8 of gradient in registers, and dy's columns of 2 048 tokens
// are 1 MiB in float32, half of L2. Fixed, because d weight is the sum of one number a block, in the blocks' order.
constexpr int kBlockVecs = 8;
constexpr int kBlockColumns = kBlockVecs * kLanes;
// Rows of tables and of gradients come and go with every pass: those that follow are asked for this early.
constexpr int64_t kRowsAhead = 4;
// Spans of rows that each thread gets, for balance where some rows are read more than others.
constexpr int64_t kSpansPerThread = 8;

// The reads of all tables, grouped by row. Of table k: tokens, weights and d_weights at [k * shape.tokens, ...), those of
// row r between edges[k * (rows + 1) + r] and the next edge.
struct Groups {
    Buffer<int32_t> edges, tokens;
    Buffer<float> weights, d_weights;

    explicit Groups(const Shape& shape)
        : edges(shape.tables * (shape.rows + 1)),
          tokens(shape.reads()),
          weights(shape.reads()),
          d_weights(shape.reads()) {}
    bool ok() const { return edges.ok() && tokens.ok() && weights.ok() && d_weights.ok(); }
};

template <typename Table, typename Code, typename Weight>
void group_table(const Code* codes, const Weight* weights, const Shape& shape, int64_t k, const Groups& groups) {
    int32_t* edges = groups.edges.get() + k * (shape.rows + 1);
    int32_t* tokens = groups.tokens.get() + k * shape.tokens;
    float* grouped = groups.weights.get() + k * shape.tokens;
    // edges[r + 1] counts row r's reads; then it is where they start; every read moves it on, at last to where they end.
    for (int64_t r = 0; r <= shape.rows; ++r) edges[r] = 0;
    for (int64_t n = 0; n < shape.tokens; ++n) ++edges[int64_t(codes[n * shape.tables + k]) + 1];
    int32_t start = 0;
    for (int64_t r = 0; r < shape.rows; ++r) {
        const int32_t count = edges[r + 1];
        edges[r + 1] = start;
        start += count;
    }
    for (int64_t n = 0; n < shape.tokens; ++n) {
        const int32_t place = edges[int64_t(codes[n * shape.tables + k]) + 1]++;
        tokens[place] = int32_t(n);
        grouped[place] = rounded_weight<Table>(weights[n * shape.tables + k]);
    }
    std::memset(groups.d_weights.get() + k * shape.tokens, 0, size_t(shape.tokens) * sizeof(float));
}

// Count tokens, at most 4: adds weight * dy to the row's gradient, token after token, and <dy, row> to d_weights.
template <int Vecs, int Count, typename T>
inline void add_tokens(const T* dy, const int32_t* tokens, const float* weights, const Vec* row, Vec* gradient,
                       float* d_weights) {
    Vec products[4] = {zero(), zero(), zero(), zero()};
    for (int i = 0; i < Count; ++i) {
        const T* slice = dy + tokens[i] * int64_t(kBlockColumns);
        const Vec weight = broadcast(weights[i]);
        for (int v = 0; v < Vecs; ++v) {
            const Vec d = load(slice + v * kLanes);
            gradient[v] = fma(weight, d, gradient[v]);
            products[i] = fma(d, row[v], products[i]);
        }
    }
    // A token's sum does not depend on the three beside it, so neither does its d weight.
    float each[4];
    _mm_storeu_ps(each, sums(products[0], products[1], products[2], products[3]));
    for (int i = 0; i < Count; ++i) d_weights[i] += each[i];
}

// Where one row's columns of a block lie; the last vector has `last` lanes.
template <typename T>
struct RowSlice {
    const T* row;
    T* gradient;
    int last;
    bool streamed;  // the gradient goes past the caches: they would evict dy for it and read its lines first
};

template <int Vecs, typename T>
inline void row_backward(const T* dy, const int32_t* tokens, const float* weights, int64_t count,
                         const RowSlice<T>& slice, float* d_weights) {
    Vec row[Vecs], gradient[Vecs];
    for (int v = 0; v < Vecs; ++v) {
        row[v] = load_lanes(slice.row + v * kLanes, v < Vecs - 1 ? kLanes : slice.last);
        gradient[v] = zero();
    }
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        add_tokens<Vecs, 4>(dy, tokens + i, weights + i, row, gradient, d_weights + i);
    }
    if (count - i == 3) add_tokens<Vecs, 3>(dy, tokens + i, weights + i, row, gradient, d_weights + i);
    if (count - i == 2) add_tokens<Vecs, 2>(dy, tokens + i, weights + i, row, gradient, d_weights + i);
    if (count - i == 1) add_tokens<Vecs, 1>(dy, tokens + i, weights + i, row, gradient, d_weights + i);
    for (int v = 0; v < Vecs; ++v) {
        if (slice.streamed) {
            stream(slice.gradient + v * kLanes, gradient[v]);
        } else {
            store_lanes(slice.gradient + v * kLanes, gradient[v], v < Vecs - 1 ? kLanes : slice.last);
        }
    }
}

// dy's columns [first, first + width) as [tokens, kBlockColumns], padded with zeros: contiguous, because columns of rows
// that lie a power of two apart would share few of the cache's sets.
template <typename T>
void pack(const T* dy, int64_t tokens, int64_t columns, int64_t first, int width, T* packed, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
        T* out = packed + n * kBlockColumns;
        std::memcpy(out, dy + n * columns + first, size_t(width) * sizeof(T));
        std::memset(out + width, 0, size_t(kBlockColumns - width) * sizeof(T));
    }
}

template <int Vecs, typename T>
void block_backward(const T* dy, const Groups& groups, const Shape& shape, const T* tables, int64_t columns,
                    int width, T* d_tables, int threads) {
    const int64_t all_rows = shape.tables * shape.rows;
    const int64_t span = max(1, ceil_div(all_rows, threads * kSpansPerThread));
    const uintptr_t alignment = uintptr_t(d_tables) | uintptr_t(columns * int64_t(sizeof(T)));
    const bool streamed = width == Vecs * kLanes && alignment % kCacheLine == 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t begin = 0; begin < all_rows; begin += span) {
        const int64_t end = min(begin + span, all_rows);
        for (int64_t i = begin; i < end; ++i) {
            if (i + kRowsAhead < end) {
                const char* ahead = reinterpret_cast<const char*>(tables + (i + kRowsAhead) * columns);
                for (int64_t b = 0; b < width * int64_t(sizeof(T)); b += kCacheLine) {
                    _mm_prefetch(ahead + b, _MM_HINT_T0);
                }
            }
            const int64_t k = i / shape.rows;
            const int32_t* edges = groups.edges.get() + i + k;  // a table has one edge more than rows
            const int64_t start = k * shape.tokens + edges[0];
            const RowSlice<T> slice{tables + i * columns, d_tables + i * columns, width - (Vecs - 1) * kLanes,
                                    streamed};
            row_backward<Vecs>(dy, groups.tokens.get() + start, groups.weights.get() + start, edges[1] - edges[0],
                               slice, groups.d_weights.get() + start);
        }
        _mm_sfence();  // what was streamed is there before the threads meet
    }
}

// From the order of rows back to that of tokens. Rounded to the tables' type first, as every sum of theirs.
template <typename Table, typename Weight>
void write_d_weights(const Groups& groups, const Shape& shape, Weight* d_weights, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < shape.tables; ++k) {
        for (int64_t i = k * shape.tokens; i < (k + 1) * shape.tokens; ++i) {
            from_float(rounded_weight<Table>(groups.d_weights.get()[i]),
                       d_weights + groups.tokens.get()[i] * shape.tables + k);
        }
    }
}

// Gradients of tables are large and new memory, whose first touch in pages of 4 KiB costs as much as all that is computed.
// So ask for pages of 2 MiB, and let each thread touch pages of its own: where two meet on one, the second waits.
inline void touch_gradients([[maybe_unused]] void* p, [[maybe_unused]] int64_t bytes, [[maybe_unused]] int threads) {
#if defined(__linux__)
    constexpr uintptr_t kHugePage = 2 << 20;
    const uintptr_t begin = (uintptr_t(p) + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (uintptr_t(p) + uintptr_t(bytes)) / kHugePage * kHugePage;
    if (begin >= end) return;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may be refused
#pragma omp parallel for num_threads(threads) schedule(static)
    for (uintptr_t page = begin; page < end; page += kHugePage) *reinterpret_cast<volatile char*>(page) = 0;
#endif
}

template <typename T, typename Code, typename Weight>
int32_t lookup_backward(const void* const* dys, const Code* codes, const Weight* weights, const Shape& shape,
                        int32_t sets, const void* const* table_sets, const int64_t* columns, Weight* d_weights,
                        void* const* d_tables, int threads) {
    Groups groups(shape);
    Buffer<T> packed(shape.tokens * kBlockColumns);
    if (!groups.ok() || !packed.ok()) return kNoMemory;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < shape.tables; ++k) group_table<T>(codes, weights, shape, k, groups);
    for (int32_t set = 0; set < sets; ++set) {
        T* gradients = static_cast<T*>(d_tables[set]);
        touch_gradients(gradients, shape.tables * shape.rows * columns[set] * int64_t(sizeof(T)), threads);
        for (int64_t first = 0; first < columns[set]; first += kBlockColumns) {
            const int width = int(min(kBlockColumns, columns[set] - first));
            pack(static_cast<const T*>(dys[set]), shape.tokens, columns[set], first, width, packed.get(), threads);
            with_vecs(int(ceil_div(width, kLanes)), [&](auto vecs) {
                block_backward<vecs.value>(packed.get(), groups, shape, static_cast<const T*>(table_sets[set]) + first,
                                           columns[set], width, gradients + first, threads);
            });
        }
    }
    write_d_weights<T>(groups, shape, d_weights, threads);
    return kDone;
}

}  // namespace
}  // namespace mf

// As mf_lookup; dys [tokens, columns[i]] and d_tables [tables, rows, columns[i]] have table_type; d_weights [tokens,
// tables], summed over the sets, has the weights' type. tokens < 2^31.
extern "C" int32_t mf_lookup_backward(const void* const* dys, const void* codes, int32_t code_type,
                                      const void* weights, int32_t weight_type, int64_t tokens, int64_t tables,
                                      int64_t rows, int32_t sets, const void* const* table_sets,
                                      const int64_t* columns, int32_t table_type, void* d_weights,
                                      void* const* d_tables, int32_t threads) {
    using namespace mf;
    const Shape shape{tokens, tables, rows};
    int64_t all_columns = 0;
    for (int32_t set = 0; set < sets; ++set) all_columns += columns[set];
    threads = useful_threads(threads, (tokens + rows) * tables * all_columns * 2);
    return with_codes(code_type, codes, [&](auto* codes) -> int32_t {
        if (!in_range(codes, shape.reads(), rows)) return kCodeOutOfRange;
        return with_floats(weight_type, weights, [&](auto* weights) -> int32_t {
            using Weight = std::remove_const_t<std::remove_pointer_t<decltype(weights)>>;
            Weight* out = static_cast<Weight*>(d_weights);
            return table_type == kFloat32 ? lookup_backward<float>(dys, codes, weights, shape, sets, table_sets,
                                                                   columns, out, d_tables, threads)
                                          : lookup_backward<bf16>(dys, codes, weights, shape, sets, table_sets,
                                                                  columns, out, d_tables, threads);
        });
    });
}
