// How often each row of each table is read: adds the codes of a step to counts that are kept between steps.

#include "operation.h"

namespace mf {
namespace {

// Counts of the tables that a thread walks over at once: they stay in L1 while all tokens pass.
constexpr int64_t kBlockBytes = 32 * 1024;

// Adds the codes of `width` tables; false where one is out of range, which then is counted in some other row.
template <typename Code>
bool count_block(const Code* codes, int64_t tokens, int64_t stride, int64_t width, int64_t rows, int64_t* counts) {
    using Unsigned = std::make_unsigned_t<Code>;
    const Unsigned mask = Unsigned(rows - 1);  // rows are a power of two
    Unsigned outside = 0;
    for (int64_t n = 0; n < tokens; ++n) {
        const Code* of_token = codes + n * stride;
        for (int64_t k = 0; k < width; ++k) {
            const Unsigned code = Unsigned(of_token[k]);
            outside |= Unsigned(code & Unsigned(~mask));
            ++counts[k * rows + int64_t(code & mask)];
        }
    }
    return outside == 0;
}

template <typename Code>
int32_t count(const Code* codes, int64_t tokens, int64_t stride, int64_t tables, int64_t rows, int64_t* counts,
              int threads) {
    const int64_t fitting = max(1, kBlockBytes / (rows * int64_t(sizeof(int64_t))));
    const int64_t width = max(1, min(fitting, ceil_div(tables, threads)));
    int32_t bad = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : bad)
    for (int64_t k = 0; k < tables; k += width) {
        bad |= !count_block(codes + k, tokens, stride, min(width, tables - k), rows, counts + k * rows);
    }
    return bad ? kCodeOutOfRange : kDone;
}

}  // namespace
}  // namespace mf

// Adds to counts [tables, rows] the codes [tokens, tables], whose tokens lie `stride` codes apart. Where a code is out
// of range the counts are of no use any more.
extern "C" int32_t mf_count(const void* codes, int32_t code_type, int64_t tokens, int64_t stride, int64_t tables,
                            int64_t rows, int64_t* counts, int32_t threads) {
    using namespace mf;
    // a count costs about as much as 16 bytes of traffic
    threads = useful_threads(threads, tokens * tables * 16);
    return with_codes(code_type, codes, [&](auto* codes) -> int32_t {
        return count(codes, tokens, stride, tables, rows, counts, threads);
    });
}
