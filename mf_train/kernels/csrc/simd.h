// Sixteen float lanes, with the same results to the last bit on every instruction set.
//
// Everything in simd_x86.h and simd_neon.h, which have the same words, is either exact or a single IEEE operation a lane,
// sums over lanes follow one tree, and `exp` is the same polynomial, so a kernel written in these words gives the same
// bits on all of them.
#pragma once

#if defined(__aarch64__)
#include "simd_neon.h"
#else
#include "simd_x86.h"
#endif

namespace mf {

// The first `count` lanes, the others zero; memory past them is not touched. 0 <= count <= 16. AVX-512 has its own.
#if !defined(__AVX512F__)
template <typename T>
inline Vec load(const T* p, int count) {
    T all[kLanes] = {};
    std::memcpy(all, p, size_t(count) * sizeof(T));
    return load(all);
}
inline void store(float* p, Vec a, int count) {
    float all[kLanes];
    store(all, a);
    std::memcpy(p, all, size_t(count) * sizeof(float));
}
#endif
inline void store(bf16* p, Vec a, int count) {
    bf16 all[kLanes];
    store(all, a);
    std::memcpy(p, all, size_t(count) * sizeof(bf16));
}

// e^x for x <= 0, to about one unit in the last place; 0 where the result is below the normal numbers; NaN for NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7 (remainder below 6e-9 e^r).
inline Vec exp_nonpositive(Vec x) {
    const Vec smallest = broadcast(-87.3f);
    const uint32_t underflow = less(x, smallest);
    const Vec bounded = select(underflow, smallest, x);
    const Vec n = round_to_integer(mul(bounded, broadcast(1.44269504f)));
    Vec r = fma(n, broadcast(-0.693359375f), bounded);  // ln 2 in two parts: the first has 9 bits, so n times it is exact
    r = fma(n, broadcast(2.12194440e-4f), r);
    Vec p = broadcast(1.0f / 5040);
    p = fma(p, r, broadcast(1.0f / 720));
    p = fma(p, r, broadcast(1.0f / 120));
    p = fma(p, r, broadcast(1.0f / 24));
    p = fma(p, r, broadcast(1.0f / 6));
    p = fma(p, r, broadcast(0.5f));
    p = fma(p, mul(r, r), r);
    p = add(p, broadcast(1.0f));
    return select(underflow, zero(), mul(p, power_of_two(n)));
}

}  // namespace mf
