// The decoder's two ways of reading weights: some rows of tables, found by code, and all rows of a matrix. Both are
// bounded by memory, so both ask for the next rows while they sum the present ones.
#pragma once

#include "operation.h"

namespace mf {

// Columns that a thread's share begins at: a multiple of these, so that no two threads read the same cache line.
constexpr int64_t kColumnUnit = 64;

struct Range {
    int64_t first, last;
    int64_t size() const { return last - first; }
};

// Part `index` of `parts` nearly equal ones of [0, count), cut at multiples of `unit`.
inline Range share(int64_t count, int64_t unit, int64_t index, int64_t parts) {
    const int64_t units = ceil_div(count, unit);
    return {min(count, units * index / parts * unit), min(count, units * (index + 1) / parts * unit)};
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }

// Rows that are summed in one pass over the columns, while as many others are on their way.
constexpr int kGroup = 8;

template <typename Table>
struct RowGroup {
    const Table* rows[kGroup];
    const float* scales[kGroup];
    float weights[kGroup];
    int count;
};

// Tables of one set as one token reads them: which rows, and times what.
template <typename Table>
struct TokenReads {
    const Table* tables;  // at the first column of this thread
    const float* scales;  // null, or [K, rows]
    const int32_t* codes;
    const float* weights;
    int64_t count, rows, columns;  // K, 2^tau, O

    RowGroup<Table> group(int64_t k) const {
        RowGroup<Table> group;
        group.count = int(min(kGroup, count - k));
        for (int j = 0; j < group.count; ++j) {
            const int64_t row = (k + j) * rows + codes[k + j];
            group.rows[j] = tables + row * columns;
            group.scales[j] = scales ? scales + row : nullptr;
            group.weights[j] = weights[k + j];
        }
        return group;
    }
};

template <typename Table>
inline void prefetch_rows(const RowGroup<Table>& group, int64_t column) {
    for (int j = 0; j < group.count; ++j) prefetch(group.rows[j] + column);
}

// sums[0..width) += weight_j * row_j over the group's rows, in order; from zero for the first group. Asks for `next`.
template <typename Table>
inline void add_group(const RowGroup<Table>& group, const RowGroup<Table>& next, int64_t width, bool first,
                      float* sums) {
    constexpr int64_t kPerLine = kCacheLine / int64_t(sizeof(Table));
    Vec weights[kGroup];
    for (int j = 0; j < group.count; ++j) {
        const float scale = group.scales[j] ? *group.scales[j] : 1.0f;
        weights[j] = broadcast(group.weights[j] * scale);
    }
    for (int j = 0; j < next.count; ++j) {
        if (next.scales[j]) prefetch(next.scales[j]);
    }
    for (int64_t line = 0; line < width; line += kPerLine) {
        prefetch_rows(next, line);
        const int64_t end = min(line + kPerLine, width);
        int64_t c = line;
        if (group.count == kGroup) {
            for (; c + kLanes <= end; c += kLanes) {
                Vec sum = first ? zero() : load(sums + c);
                for (int j = 0; j < kGroup; ++j) sum = fma(weights[j], load(group.rows[j] + c), sum);
                store(sums + c, sum);
            }
        }
        for (; c < end; c += kLanes) {
            const int lanes = int(min(kLanes, end - c));
            Vec sum = first ? zero() : load(sums + c);
            for (int j = 0; j < group.count; ++j) sum = fma(weights[j], load(group.rows[j] + c, lanes), sum);
            store(sums + c, sum);
        }
    }
}

// Lookups of `items` (token, table set) pairs, `reads(i)` each, over `width` columns, one after the other without a
// gap in the requests to memory; `done(i, sums)` gets each result. `sums`: width floats rounded up to 16.
template <typename Reads, typename Done>
inline void lookup_items(int64_t items, int64_t width, float* sums, Reads reads, Done done) {
    if (items == 0 || width == 0) return;
    auto current = reads(0);
    auto group = current.group(0);
    constexpr int64_t kPerLine = kCacheLine / int64_t(sizeof(*group.rows[0]));
    for (int64_t line = 0; line < width; line += kPerLine) prefetch_rows(group, line);
    for (int64_t item = 0; item < items; ++item) {
        const int64_t count = current.count;
        const auto following = item + 1 < items ? reads(item + 1) : current;
        for (int64_t k = 0; k < count; k += kGroup) {
            auto next = group;
            if (k + kGroup < count) {
                next = current.group(k + kGroup);
            } else if (item + 1 < items) {
                next = following.group(0);
            } else {
                next.count = 0;
            }
            add_group(group, next, width, k == 0, sums);
            group = next;
        }
        done(item, sums);
        current = following;
    }
}

// Rows of a matrix that are multiplied side by side.
template <int Batch>
constexpr int kRowsAtOnce = Batch <= 4 ? 4 : 2;

// dots[r][b] = <row r, x_b> for Rows rows of `features` columns; x [Batch, x_stride] padded to 16 lanes.
template <int Rows, int Batch, typename W>
inline void dot_rows(const W* rows, int64_t features, const float* x, int64_t x_stride, float dots[Rows][Batch]) {
    constexpr int64_t kAheadBytes = 8192;
    Vec sums[Rows][Batch];
    for (int r = 0; r < Rows; ++r) {
        for (int b = 0; b < Batch; ++b) sums[r][b] = zero();
    }
    const char* ahead = reinterpret_cast<const char*>(rows) + kAheadBytes;
    const int64_t step = features * int64_t(sizeof(W));
    auto add = [&](int64_t c, auto load_row) {
        Vec weights[Rows];
        for (int r = 0; r < Rows; ++r) weights[r] = load_row(rows + r * features + c);
        for (int b = 0; b < Batch; ++b) {
            const Vec value = load(x + b * x_stride + c);
            for (int r = 0; r < Rows; ++r) sums[r][b] = fma(weights[r], value, sums[r][b]);
        }
    };
    int64_t c = 0;
    for (; c + kLanes <= features; c += kLanes) {
        if (c * int64_t(sizeof(W)) % kCacheLine == 0) {
            for (int r = 0; r < Rows; ++r) prefetch(ahead + r * step + c * int64_t(sizeof(W)));
        }
        add(c, [](const W* p) { return load(p); });
    }
    if (c < features) {
        const int lanes = int(features - c);
        add(c, [lanes](const W* p) { return load(p, lanes); });
    }
    for (int r = 0; r < Rows; ++r) {
        for (int b = 0; b < Batch; ++b) dots[r][b] = sum(sums[r][b]);
    }
}

// y[b, v] = <x_b, row v> * scale_v for rows [range); scales may be null.
template <int Batch, typename W, typename Y>
inline void multiply_rows(const W* matrix, const float* scales, Range range, int64_t features, const float* x,
                          int64_t x_stride, Y* y, int64_t y_stride) {
    auto rows = [&](auto count, int64_t first) {
        constexpr int kRows = decltype(count)::value;
        float dots[kRows][Batch];
        dot_rows<kRows, Batch>(matrix + first * features, features, x, x_stride, dots);
        for (int r = 0; r < kRows; ++r) {
            const float scale = scales ? scales[first + r] : 1.0f;
            for (int b = 0; b < Batch; ++b) from_float(dots[r][b] * scale, y + b * y_stride + first + r);
        }
    };
    constexpr int kRows = kRowsAtOnce<Batch>;
    int64_t row = range.first;
    for (; row + kRows <= range.last; row += kRows) rows(std::integral_constant<int, kRows>(), row);
    for (; row < range.last; ++row) rows(std::integral_constant<int, 1>(), row);
}

}  // namespace mf
