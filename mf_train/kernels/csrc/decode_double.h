// Eight float64 lanes, for what is rounded to bfloat16 next and must round as the plain model's does: sums in another
// order differ by 1e-16 of themselves, which moves a rounding to 8 bits once in 10^13 values. With float32 sums it is
// once in ten thousand, and a hash turns one such bit into another row of a table.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace mf {

typedef double Double8 __attribute__((vector_size(64)));
typedef float Float8 __attribute__((vector_size(32)));
typedef double Double2 __attribute__((vector_size(16)));
typedef int64_t Int8 __attribute__((vector_size(64)));

inline void widen(const Vec& a, Double8& low, Double8& high) {
    float all[kLanes];
    store(all, a);
    Float8 half;
    std::memcpy(&half, all, sizeof(half));
    low = __builtin_convertvector(half, Double8);
    std::memcpy(&half, all + 8, sizeof(half));
    high = __builtin_convertvector(half, Double8);
}

inline double sum(const Double8& a) {
    Double2 pair[4];
    std::memcpy(pair, &a, sizeof(pair));
    const Double2 two = (pair[0] + pair[2]) + (pair[1] + pair[3]);
    return two[0] + two[1];
}

// e^x for x <= 0 to about 3e-16 of itself; 0 below -708; NaN for NaN. x = n ln 2 + r, |r| <= ln 2 / 2, and e^r by its
// Taylor polynomial of degree 13.
inline void exponential(Double8& x) {
    constexpr double kCoefficients[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                        1.0 / 40320,     1.0 / 5040,     1.0 / 720,     1.0 / 120,
                                        1.0 / 24,        1.0 / 6,        0.5,           1.0, 1.0};
    constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves a whole number in the low bits
    const Double8 least = Double8{} - 708.0;
    const Int8 tiny = x < least;
    const Double8 bounded = tiny ? least : x;
    const Double8 shifted = bounded * 1.4426950408889634 + kRound;
    const Double8 n = shifted - kRound;
    Double8 r = bounded - n * 0.6931471803691238;  // ln 2 in two parts, the first with zeros at its end
    r = r - n * 1.9082149292705877e-10;
    Double8 p = r * (1.0 / 6227020800) + kCoefficients[0];
    for (int i = 1; i < 13; ++i) p = p * r + kCoefficients[i];
    Int8 bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits + 1023) << 52;
    Double8 power;
    std::memcpy(&power, &bits, sizeof(power));
    x = tiny ? Double8{} : p * power;
}

}  // namespace mf
