// Lookup backward: d weight = <dy, row> and d row = sum of weight * dy over the row's readers, in one pass over dy.
//
// A stable counting sort groups the tokens of each table by code, so one thread owns a row: it holds the row and its
// gradient in registers and reads dy of its tokens, in order, once for both. No atomics; a row's gradient is written
// once, zeros for a row that nobody read. The same bits in every run and for any number of threads.
//
// d weight is a sum over columns, which tensor-parallel ranks split. So the columns are cut into chunks; each chunk is
// summed by itself, over all sets, and then neighbours are added in pairs: a rank that holds a branch of that tree
// computes it with the same bits. Narrow chunks share a vector, 4 or 8 lanes each: the sum of its lanes, which is the
// dear part of narrow sums, is then the last levels of the tree.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "operation.h"

namespace mf {
namespace {

// Vectors of one pass over all tables: as many of row and of gradient are in registers, and dy's columns of 2 048 tokens
// are about 1 MiB in float32.
constexpr int kPassVecs = 9;
constexpr int kMaxChunks = 8;
// Rows of tables and of gradients come and go with every pass: those that follow are asked for this early.
constexpr int64_t kRowsAhead = 4;
// Spans of rows that each thread gets, for balance where some rows are read more than others.
constexpr int64_t kSpansPerThread = 8;

// The reads of all tables, grouped by row. Of table k: tokens and weights at [k * shape.tokens, ...), those of row r
// between edges[k * (rows + 1) + r] and the next edge.
struct Groups {
    Buffer<int32_t> edges, tokens;
    Buffer<float> weights;

    explicit Groups(const Shape& shape)
        : edges(shape.tables * (shape.rows + 1)), tokens(shape.reads()), weights(shape.reads()) {}
    bool ok() const { return edges.ok() && tokens.ok() && weights.ok(); }
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
}

// Count tokens, at most 4: adds weight * dy to the row's gradient, token after token, and <dy, row> to d_weights.
template <int Vecs, int Count, typename T>
inline void add_tokens(const T* dy, const int32_t* tokens, const float* weights, const Vec* row, Vec* gradient,
                       float* d_weights) {
    Vec products[4] = {zero(), zero(), zero(), zero()};
    for (int i = 0; i < Count; ++i) {
        const T* slice = dy + tokens[i] * int64_t(Vecs * kLanes);
        const Vec weight = broadcast(weights[i]);
#pragma GCC unroll 9
        for (int v = 0; v < Vecs; ++v) {
            const Vec d = load(slice + v * kLanes);
            gradient[v] = fma(weight, d, gradient[v]);
            products[i] = fma(d, row[v], products[i]);
        }
    }
    // A token's sum does not depend on the three beside it, so neither does its d weight.
    float each[4];
    store_four(each, sums(products[0], products[1], products[2], products[3]));
    for (int i = 0; i < Count; ++i) d_weights[i] += each[i];
}

template <typename T>
struct Sets {
    const void* const* dys;
    const void* const* tables;
    void* const* d_tables;
    const int64_t* columns;
    int32_t count;
    int64_t chunks;

    const T* dy(int set) const { return static_cast<const T*>(dys[set]); }
    const T* table(int set) const { return static_cast<const T*>(tables[set]); }
    T* d_table(int set) const { return static_cast<T*>(d_tables[set]); }
    int64_t chunk(int set) const { return columns[set] / chunks; }
};

// Columns of one table set that fill a vector: those of `beside` neighbouring chunks, kLanes / beside of each.
template <typename T>
struct Piece {
    const T *dy, *table;  // the set's
    T* d_table;
    int64_t columns;   // of the set
    int64_t chunk;     // columns of a chunk
    int64_t first;     // column of the first lane
    int64_t fours[4];  // columns of lanes 0, 4, 8 and 12
    int64_t whole;     // the set's columns of a pass, one after the other, as vectors: the first column of this one
    int64_t places[4];  // of lanes 0, 4, 8 and 12 in all vectors of the pass, laid so
    int width;         // columns of each chunk that count: the lanes past them are zero
};

// What one pass takes of every set: up to kPassVecs vectors, each with columns of the same chunks.
template <typename T>
struct Pass {
    int beside;   // chunks that share a vector: 1, 2 or 4
    int present;  // those of them that this rank holds
    bool full;    // every lane counts
    int vecs;
    Piece<T> pieces[kPassVecs];

    // f(lane, column) for the first column of each chunk of a piece.
    template <typename F>
    void for_each_chunk(const Piece<T>& piece, F f) const {
        for (int c = 0; c < present; ++c) f(c * kLanes / beside, piece.first + c * piece.chunk);
    }
};

// The pass's vectors of row i.
template <int Vecs, typename T>
inline void load_row(const Pass<T>& pass, int64_t i, Vec* row) {
    const Piece<T>* pieces = pass.pieces;
    if (pass.full && pass.beside == 1) {
#pragma GCC unroll 9
        for (int v = 0; v < Vecs; ++v) row[v] = load(pieces[v].table + i * pieces[v].columns + pieces[v].first);
    } else if (pass.full) {
#pragma GCC unroll 9
        for (int v = 0; v < Vecs; ++v) {
            const T* from = pieces[v].table + i * pieces[v].columns;
            const int64_t* fours = pieces[v].fours;
            row[v] = load_fours(from + fours[0], from + fours[1], from + fours[2], from + fours[3]);
        }
    } else {
#pragma GCC unroll 9
        for (int v = 0; v < Vecs; ++v) {
            T all[kLanes] = {};
            pass.for_each_chunk(pieces[v], [&](int lane, int64_t column) {
                const T* from = pieces[v].table + i * pieces[v].columns + column;
                std::memcpy(all + lane, from, size_t(pieces[v].width) * sizeof(T));
            });
            row[v] = load(all);
        }
    }
}

// `streamed`: whole lines of gradients go past the caches; they would evict dy for it and read its lines first.
template <int Vecs, typename T>
inline void store_row(const Pass<T>& pass, int64_t i, bool streamed, const Vec* gradient) {
    const Piece<T>* pieces = pass.pieces;
    if (streamed && pass.beside == 1) {
#pragma GCC unroll 9
        for (int v = 0; v < Vecs; ++v) stream(pieces[v].d_table + i * pieces[v].columns + pieces[v].whole, gradient[v]);
        return;
    }
    alignas(kCacheLine) T ordered[kPassVecs * kLanes];
#pragma GCC unroll 9
    for (int v = 0; v < Vecs; ++v) {
        T all[kLanes];
        store(all, gradient[v]);
        T* to = pieces[v].d_table + i * pieces[v].columns;
        if (streamed) {
            for (int j = 0; j < 4; ++j) std::memcpy(ordered + pieces[v].places[j], all + 4 * j, 4 * sizeof(T));
        } else if (pass.full) {
            for (int j = 0; j < 4; ++j) std::memcpy(to + pieces[v].fours[j], all + 4 * j, 4 * sizeof(T));
        } else {
            pass.for_each_chunk(pieces[v], [&](int lane, int64_t column) {
                std::memcpy(to + column, all + lane, size_t(pieces[v].width) * sizeof(T));
            });
        }
    }
    if (!streamed) return;
#pragma GCC unroll 9
    for (int v = 0; v < Vecs; ++v) {
        stream(pieces[v].d_table + i * pieces[v].columns + pieces[v].whole, load(ordered + v * kLanes));
    }
}

template <int Vecs, typename T>
inline void row_backward(const T* dy, const int32_t* tokens, const float* weights, int64_t count, const Vec* row,
                         Vec* gradient, float* d_weights) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        add_tokens<Vecs, 4>(dy, tokens + i, weights + i, row, gradient, d_weights + i);
    }
    if (count - i == 3) add_tokens<Vecs, 3>(dy, tokens + i, weights + i, row, gradient, d_weights + i);
    if (count - i == 2) add_tokens<Vecs, 2>(dy, tokens + i, weights + i, row, gradient, d_weights + i);
    if (count - i == 1) add_tokens<Vecs, 1>(dy, tokens + i, weights + i, row, gradient, d_weights + i);
}

// dy's columns of a pass as [tokens, vecs * kLanes], zeros in the lanes that do not count: contiguous, because columns of
// rows that lie a power of two apart would share few of the cache's sets.
template <typename T>
void pack(const Pass<T>& pass, int64_t tokens, T* packed, int threads) {
    constexpr int64_t kTokens = 64;
    const int64_t width = pass.vecs * kLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t begin = 0; begin < tokens; begin += kTokens) {
        const int64_t end = min(begin + kTokens, tokens);
        for (int v = 0; v < pass.vecs; ++v) {
            const Piece<T> piece = pass.pieces[v];
            T* out = packed + begin * width + v * kLanes;
            const T* in = piece.dy + begin * piece.columns;
            for (int64_t n = begin; n < end; ++n, out += width, in += piece.columns) {
                if (pass.full) {
                    for (int i = 0; i < 4; ++i) std::memcpy(out + 4 * i, in + piece.fours[i], 4 * sizeof(T));
                    continue;
                }
                std::memset(out, 0, kLanes * sizeof(T));
                pass.for_each_chunk(piece, [&](int lane, int64_t column) {
                    std::memcpy(out + lane, in + column, size_t(piece.width) * sizeof(T));
                });
            }
        }
    }
}

// One pass: gradients of its columns, and the sum over its columns added to d_weights (in the order of rows).
template <int Vecs, typename T>
void pass_backward(const T* dy, const Groups& groups, const Shape& shape, const Pass<T>& pass, float* d_weights,
                   int threads) {
    const int64_t all_rows = shape.tables * shape.rows;
    const int64_t span = max(1, ceil_div(all_rows, threads * kSpansPerThread));
    bool streamed = pass.full;
    for (int v = 0; v < Vecs; ++v) {
        const Piece<T>& piece = pass.pieces[v];
        const uintptr_t row_bytes = uintptr_t(piece.columns) * sizeof(T);
        streamed = streamed && (uintptr_t(piece.d_table + piece.whole) | row_bytes) % kCacheLine == 0;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t begin = 0; begin < all_rows; begin += span) {
        const int64_t end = min(begin + span, all_rows);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t ahead = min(i + kRowsAhead, end - 1);
            for (int v = 0; v < Vecs; ++v) {
                const Piece<T>& piece = pass.pieces[v];
                __builtin_prefetch(piece.table + ahead * piece.columns + piece.whole);
            }
            Vec row[Vecs], gradient[Vecs];
            load_row<Vecs>(pass, i, row);
#pragma GCC unroll 9
            for (int v = 0; v < Vecs; ++v) gradient[v] = zero();
            const int64_t k = i / shape.rows;
            const int32_t* edges = groups.edges.get() + i + k;  // a table has one edge more than rows
            const int64_t start = k * shape.tokens + edges[0];
            row_backward<Vecs>(dy, groups.tokens.get() + start, groups.weights.get() + start, edges[1] - edges[0], row,
                               gradient, d_weights + start);
            store_row<Vecs>(pass, i, streamed, gradient);
        }
        stream_fence();  // what was streamed is there before the threads meet
    }
}

// Vectors that hold `lanes` columns of a chunk each, of all sets.
template <typename T>
int64_t vectors(const Sets<T>& sets, int lanes) {
    int64_t count = 0;
    for (int set = 0; set < sets.count; ++set) count += ceil_div(sets.chunk(set), lanes);
    return count;
}

// Vectors [begin, begin + count) of chunks [chunk, chunk + beside).
template <typename T>
Pass<T> make_pass(const Sets<T>& sets, int64_t chunk, int beside, int64_t begin, int64_t count) {
    Pass<T> pass{beside, int(min(beside, sets.chunks - chunk)), true, 0, {}};
    const int lanes = kLanes / beside;
    pass.full = pass.present == beside;
    int64_t v = 0;
    for (int set = 0; set < sets.count; ++set) {
        const int64_t size = sets.chunk(set), start = chunk * size;
        for (int64_t i = 0; i * lanes < size; ++i, ++v) {
            if (v < begin || v >= begin + count) continue;
            const int64_t first = start + i * lanes;
            const int width = int(min(lanes, size - i * lanes));
            Piece<T> piece{sets.dy(set), sets.table(set), sets.d_table(set), sets.columns[set], size, first, {},
                           start + i * kLanes, {}, width};
            for (int four = 0; four < 4; ++four) {
                piece.fours[four] = first + 4 * four / lanes * size + 4 * four % lanes;
                piece.places[four] = (pass.vecs - i) * kLanes + piece.fours[four] - start;
            }
            pass.full = pass.full && width == lanes;
            pass.pieces[pass.vecs++] = piece;
        }
    }
    return pass;
}

template <typename T>
class Backward {
public:
    Backward(const Groups& groups, const Shape& shape, const Sets<T>& sets, int threads)
        : groups_(groups),
          shape_(shape),
          sets_(sets),
          threads_(threads),
          packed_(shape.tokens * kPassVecs * kLanes),
          sums_(kLevels * shape.reads()) {}
    bool ok() const { return packed_.ok() && sums_.ok(); }

    // Runs all passes; returns d weights in the order of rows.
    const float* run() {
        int beside = 4;  // as many chunks in a vector as let one pass hold them; it depends on the chunks' sizes alone
        while (beside > 1 && vectors(sets_, kLanes / beside) > kPassVecs) beside /= 2;
        const int64_t groups = ceil_div(sets_.chunks, beside);
        int level = 0;
        for (int64_t group = 0; group < groups; ++group, ++level) {
            group_backward(group * beside, beside, sums(level));
            for (int64_t done = group + 1; done % 2 == 0; done /= 2, --level) add_to(sums(level - 1), sums(level));
        }
        return sums(0);
    }

private:
    static constexpr int kLevels = 4;  // of a tree over kMaxChunks

    float* sums(int level) const { return sums_.get() + level * shape_.reads(); }

    void add_to(float* total, const float* part) const {
#pragma omp parallel for num_threads(threads_) schedule(static)
        for (int64_t k = 0; k < shape_.tables; ++k) {
            for (int64_t i = k * shape_.tokens; i < (k + 1) * shape_.tokens; ++i) total[i] += part[i];
        }
    }

    // Chunks [first, first + beside), in passes of about as many vectors each, in order.
    void group_backward(int64_t first, int beside, float* d_weights) const {
        const int64_t vecs = vectors(sets_, kLanes / beside);
        const int64_t per_pass = ceil_div(vecs, ceil_div(vecs, kPassVecs));
        std::memset(d_weights, 0, size_t(shape_.reads()) * sizeof(float));
        for (int64_t begin = 0; begin < vecs; begin += per_pass) {
            const Pass<T> pass = make_pass(sets_, first, beside, begin, per_pass);
            pack(pass, shape_.tokens, packed_.get(), threads_);
            with_vecs(pass.vecs, [&](auto count) {
                pass_backward<count.value>(packed_.get(), groups_, shape_, pass, d_weights, threads_);
            });
        }
    }

    const Groups& groups_;
    const Shape& shape_;
    const Sets<T>& sets_;
    int threads_;
    Buffer<T> packed_;
    Buffer<float> sums_;
};

// From the order of rows back to that of tokens.
inline void write_d_weights(const Groups& groups, const Shape& shape, const float* grouped, float* d_weights,
                            int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < shape.tables; ++k) {
        for (int64_t i = k * shape.tokens; i < (k + 1) * shape.tokens; ++i) {
            d_weights[groups.tokens.get()[i] * shape.tables + k] = grouped[i];
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
int32_t lookup_backward(const Code* codes, const Weight* weights, const Shape& shape, const Sets<T>& sets,
                        float* d_weights, int threads) {
    const Groups groups(shape);
    if (!groups.ok()) return kNoMemory;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < shape.tables; ++k) group_table<T>(codes, weights, shape, k, groups);
    for (int32_t set = 0; set < sets.count; ++set) {
        touch_gradients(sets.d_table(set), shape.tables * shape.rows * sets.columns[set] * int64_t(sizeof(T)), threads);
    }
    Backward<T> backward(groups, shape, sets, threads);
    if (!backward.ok()) return kNoMemory;
    write_d_weights(groups, shape, backward.run(), d_weights, threads);
    return kDone;
}

}  // namespace
}  // namespace mf

// As mf_lookup; dys [tokens, columns[i]] and d_tables [tables, rows, columns[i]] have table_type; d_weights [tokens,
// tables] float32, summed over the sets and `chunks` equal chunks of their columns: 1, 2, 4 or 8. tokens < 2^31.
extern "C" int32_t mf_lookup_backward(const void* const* dys, const void* codes, int32_t code_type,
                                      const void* weights, int32_t weight_type, int64_t tokens, int64_t tables,
                                      int64_t rows, int32_t sets, const void* const* table_sets,
                                      const int64_t* columns, int32_t table_type, int64_t chunks, float* d_weights,
                                      void* const* d_tables, int32_t threads) {
    using namespace mf;
    const Shape shape{tokens, tables, rows};
    int64_t all_columns = 0;
    for (int32_t set = 0; set < sets; ++set) all_columns += columns[set];
    threads = useful_threads(threads, (tokens + rows) * tables * all_columns * 2);
    return with_codes(code_type, codes, [&](auto* codes) -> int32_t {
        if (!in_range(codes, shape.reads(), rows)) return kCodeOutOfRange;
        return with_floats(weight_type, weights, [&](auto* weights) -> int32_t {
            if (table_type == kFloat32) {
                const Sets<float> all{dys, table_sets, d_tables, columns, sets, chunks};
                return lookup_backward<float>(codes, weights, shape, all, d_weights, threads);
            }
            const Sets<bf16> all{dys, table_sets, d_tables, columns, sets, chunks};
            return lookup_backward<bf16>(codes, weights, shape, all, d_weights, threads);
        });
    });
}
