// The words of simd.h for x86: one AVX-512 register or two AVX2 ones, with the same results to the last bit.
#pragma once

#include <immintrin.h>

#include "float_types.h"

#if !defined(__FMA__)
#error "compile with -mavx2 -mfma, or with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma"
#endif

namespace mf {

typedef __m128 Four;

inline void relax() { _mm_pause(); }
inline void stream_fence() { _mm_sfence(); }
inline void store_four(float* p, Four a) { _mm_storeu_ps(p, a); }

#if defined(__AVX512F__)

struct Vec {
    __m512 v;
};

inline Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) {
    __m512i bits = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// Past the caches; p is aligned to the vector's bytes (64 and 32).
inline void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }

// The first `count` lanes, the others zero; memory past them is not touched. 0 <= count <= 16.
inline __mmask16 lanes(int count) { return __mmask16((1u << count) - 1); }
inline Vec load(const float* p, int count) { return {_mm512_maskz_loadu_ps(lanes(count), p)}; }
inline Vec load(const bf16* p, int count) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(count), p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load(const int8_t* p, int count) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(count), p)))};
}
inline void store(float* p, Vec a, int count) { _mm512_mask_storeu_ps(p, lanes(count), a.v); }

// values[i * stride] for i = 0..15.
inline Vec gather(const float* p, int stride) {
    __m512i index = _mm512_mullo_epi32(_mm512_set1_epi32(stride),
                                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    return {_mm512_i32gather_ps(index, p, 4)};
}

// values[index[i]] for i = 0..15, each index from 0 to 15.
inline Vec pick(const float* values, const int32_t* index) {
    return {_mm512_permutexvar_ps(_mm512_loadu_si512(index), _mm512_loadu_ps(values))};
}

// Bit i of the result: lane i >= 0. -0.0 is, a NaN is not.
inline uint32_t nonnegative(Vec a) { return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GE_OQ); }
// Lane i of a where bit i of the mask is set, else of b.
inline Vec select(uint32_t mask, Vec a, Vec b) { return {_mm512_mask_blend_ps(__mmask16(mask), b.v, a.v)}; }
inline uint32_t less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Vec negate(Vec a) {
    return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MIN)))};
}
inline Vec round_to_integer(Vec a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^n of whole numbers n in [-126, 127].
inline Vec power_of_two(Vec n) {
    __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
// Within each group of four lanes: a0 b0 a1 b1, a2 b2 a3 b3, a0 a1 b0 b1, a2 a3 b2 b3.
inline Vec unpack_low(Vec a, Vec b) { return {_mm512_unpacklo_ps(a.v, b.v)}; }
inline Vec unpack_high(Vec a, Vec b) { return {_mm512_unpackhi_ps(a.v, b.v)}; }
inline Vec pairs_low(Vec a, Vec b) { return {_mm512_shuffle_ps(a.v, b.v, 0x44)}; }
inline Vec pairs_high(Vec a, Vec b) { return {_mm512_shuffle_ps(a.v, b.v, 0xee)}; }
inline __m256 low_half(Vec a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high_half(Vec a) { return _mm512_extractf32x8_ps(a.v, 1); }
inline Vec halves(__m256 low, __m256 high) {
    return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
}
// Groups of four lanes: 0 with 1 and 2 with 3 change places.
inline Vec swap_groups(Vec a) { return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)}; }

#else

struct Vec {
    __m256 low, high;
};

inline Vec broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Vec fma(Vec a, Vec b, Vec c) {  // a * b + c
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widen(__m128i half) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec load(const bf16* p) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(p);
    return {widen(_mm_loadu_si128(halves)), widen(_mm_loadu_si128(halves + 1))};
}
inline Vec load(const int8_t* p) {
    __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(all, 8)))};
}
inline void store(float* p, Vec a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}
inline __m256i round_to_bf16(__m256 a) {
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
inline void store(bf16* p, Vec a) {
    __m256i packed = _mm256_packus_epi32(round_to_bf16(a.low), round_to_bf16(a.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

// Past the caches; p is aligned to the vector's bytes (64 and 32).
inline void stream(float* p, Vec a) {
    _mm256_stream_ps(p, a.low);
    _mm256_stream_ps(p + 8, a.high);
}

// values[i * stride] for i = 0..15.
inline Vec gather(const float* p, int stride) {
    __m256i index = _mm256_mullo_epi32(_mm256_set1_epi32(stride), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return {_mm256_i32gather_ps(p, index, 4), _mm256_i32gather_ps(p + 8 * int64_t(stride), index, 4)};
}

// values[index[i]] for i = 0..15, each index from 0 to 15.
inline Vec pick(const float* values, const int32_t* index) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(index);
    return {_mm256_i32gather_ps(values, _mm256_loadu_si256(halves), 4),
            _mm256_i32gather_ps(values, _mm256_loadu_si256(halves + 1), 4)};
}

// Bit i of the result: lane i >= 0. -0.0 is, a NaN is not.
inline uint32_t nonnegative(Vec a) {
    __m256 none = _mm256_setzero_ps();
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.low, none, _CMP_GE_OQ))) |
           uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.high, none, _CMP_GE_OQ))) << 8;
}
inline __m256 lane_mask(uint32_t bits) {
    __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), each), each));
}
// Lane i of a where bit i of the mask is set, else of b.
inline Vec select(uint32_t mask, Vec a, Vec b) {
    return {_mm256_blendv_ps(b.low, a.low, lane_mask(mask)), _mm256_blendv_ps(b.high, a.high, lane_mask(mask >> 8))};
}
inline uint32_t less(Vec a, Vec b) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ))) |
           uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))) << 8;
}
inline Vec negate(Vec a) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_xor_ps(a.low, sign), _mm256_xor_ps(a.high, sign)};
}
inline Vec round_to_integer(Vec a) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
}
inline __m256 power_of_two(__m256 n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
// 2^n of whole numbers n in [-126, 127].
inline Vec power_of_two(Vec n) { return {power_of_two(n.low), power_of_two(n.high)}; }
// Within each group of four lanes: a0 b0 a1 b1, a2 b2 a3 b3, a0 a1 b0 b1, a2 a3 b2 b3.
inline Vec unpack_low(Vec a, Vec b) { return {_mm256_unpacklo_ps(a.low, b.low), _mm256_unpacklo_ps(a.high, b.high)}; }
inline Vec unpack_high(Vec a, Vec b) { return {_mm256_unpackhi_ps(a.low, b.low), _mm256_unpackhi_ps(a.high, b.high)}; }
inline Vec pairs_low(Vec a, Vec b) {
    return {_mm256_shuffle_ps(a.low, b.low, 0x44), _mm256_shuffle_ps(a.high, b.high, 0x44)};
}
inline Vec pairs_high(Vec a, Vec b) {
    return {_mm256_shuffle_ps(a.low, b.low, 0xee), _mm256_shuffle_ps(a.high, b.high, 0xee)};
}
inline __m256 low_half(Vec a) { return a.low; }
inline __m256 high_half(Vec a) { return a.high; }
inline Vec halves(__m256 low, __m256 high) { return {low, high}; }
// Groups of four lanes: 0 with 1 and 2 with 3 change places.
inline Vec swap_groups(Vec a) {
    return {_mm256_permute2f128_ps(a.low, a.low, 1), _mm256_permute2f128_ps(a.high, a.high, 1)};
}

#endif

// Sum of the lanes: 0 with 8, 1 with 9 ...; then 0 with 4 ...; then 0 with 2; then 0 with 1.
inline float sum(Vec a) {
    __m256 eight = _mm256_add_ps(low_half(a), high_half(a));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline void stream(bf16* p, Vec a) {
    alignas(32) bf16 all[kLanes];
    store(all, a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_load_si256(reinterpret_cast<const __m256i*>(all)));
}

// The sums of four vectors' lanes. Of each: lane i with i + 2, then with i + 1, within each group of four; then the
// groups 0 with 1 and 2 with 3, then both. So where a vector holds 4 lanes of each of four chunks, or 8 of each of two,
// its sum is the chunks' sums added in pairs.
inline Four sums(Vec a, Vec b, Vec c, Vec d) {
    const Vec ab = add(unpack_low(a, b), unpack_high(a, b));
    const Vec cd = add(unpack_low(c, d), unpack_high(c, d));
    const Vec all = add(pairs_low(ab, cd), pairs_high(ab, cd));
    const Vec pairs = add(all, swap_groups(all));
    return _mm_add_ps(_mm256_castps256_ps128(low_half(pairs)), _mm256_castps256_ps128(high_half(pairs)));
}

inline __m128 load_four(const float* p) { return _mm_loadu_ps(p); }
inline __m128 load_four(const bf16* p) {
    const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(narrow), 16));
}
// Four lanes from each of four places.
template <typename T>
inline Vec load_fours(const T* a, const T* b, const T* c, const T* d) {
    return halves(_mm256_set_m128(load_four(b), load_four(a)), _mm256_set_m128(load_four(d), load_four(c)));
}

}  // namespace mf
