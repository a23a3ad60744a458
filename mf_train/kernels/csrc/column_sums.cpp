// Sums over rows, such as a bias's gradient. Every column is a sum of its own, within blocks of rows and then over the
// blocks, in order: it depends neither on how many columns there are nor on the threads.

#include "operation.h"

namespace mf {
namespace {

constexpr int64_t kRowsPerBlock = 64;

template <typename T>
int32_t column_sums(const T* x, int64_t rows, int64_t columns, float* out, int threads) {
    const int64_t blocks = ceil_div(rows, kRowsPerBlock);
    Buffer<float> partial(blocks * columns);
    if (!partial.ok()) return kNoMemory;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t end = min((b + 1) * kRowsPerBlock, rows);
        for (int64_t i = 0; i < columns; i += kLanes) {
            const int count = int(min(kLanes, columns - i));
            Vec total = zero();
            for (int64_t n = b * kRowsPerBlock; n < end; ++n) total = add(total, load_lanes(x + n * columns + i, count));
            store_lanes(partial.get() + b * columns + i, total, count);
        }
    }
    for (int64_t i = 0; i < columns; ++i) out[i] = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t i = 0; i < columns; ++i) out[i] += partial.get()[b * columns + i];
    }
    return kDone;
}

}  // namespace
}  // namespace mf

// x [rows, columns] of `type` -> out [columns] float32.
extern "C" int32_t mf_column_sums(const void* x, int32_t type, int64_t rows, int64_t columns, float* out,
                                  int32_t threads) {
    using namespace mf;
    threads = useful_threads(threads, rows * columns * 4);
    return with_floats(type, x, [&](auto* values) { return column_sums(values, rows, columns, out, threads); });
}
