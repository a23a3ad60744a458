// The words of simd.h for Arm: four NEON registers, with x86's results to the last bit, NaN's sign aside.
#pragma once

#include <arm_neon.h>

#include "float_types.h"

namespace mf {

struct Vec {
    float32x4_t part[4];
};
typedef float32x4_t Four;

inline void relax() { asm volatile("yield"); }
inline void stream_fence() {}
inline void store_four(float* p, Four a) { vst1q_f32(p, a); }

// The vector whose part i is f(i).
template <typename F>
inline Vec each_part(F f) {
    return {f(0), f(1), f(2), f(3)};
}
inline Vec broadcast(float value) {
    return each_part([=](int) { return vdupq_n_f32(value); });
}
inline Vec zero() { return broadcast(0.0f); }
inline Vec add(Vec a, Vec b) {
    return each_part([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
}
inline Vec sub(Vec a, Vec b) {
    return each_part([&](int i) { return vsubq_f32(a.part[i], b.part[i]); });
}
inline Vec mul(Vec a, Vec b) {
    return each_part([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
}
inline Vec div(Vec a, Vec b) {
    return each_part([&](int i) { return vdivq_f32(a.part[i], b.part[i]); });
}
inline Vec fma(Vec a, Vec b, Vec c) {  // a * b + c
    return each_part([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
}
inline Vec negate(Vec a) {
    return each_part([&](int i) { return vnegq_f32(a.part[i]); });
}
inline Vec round_to_integer(Vec a) {
    return each_part([&](int i) { return vrndnq_f32(a.part[i]); });
}
// 2^n of whole numbers n in [-126, 127].
inline Vec power_of_two(Vec n) {
    return each_part([&](int i) {
        const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.part[i]), vdupq_n_s32(127));
        return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
    });
}

inline float32x4_t load_four(const float* p) { return vld1q_f32(p); }
inline float32x4_t load_four(const bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
// Four lanes from each of four places.
template <typename T>
inline Vec load_fours(const T* a, const T* b, const T* c, const T* d) {
    return {load_four(a), load_four(b), load_four(c), load_four(d)};
}
template <typename T>
inline Vec load(const T* p) {
    return load_fours(p, p + 4, p + 8, p + 12);
}
inline Vec load(const int8_t* p) {
    const int8x16_t all = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(all)), high = vmovl_high_s8(all);
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))};
}
inline void store(float* p, Vec a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.part[i]);
}
inline void store(bf16* p, Vec a) {
    for (int i = 0; i < 4; ++i) {
        const uint32x4_t bits = vreinterpretq_u32_f32(a.part[i]);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
        const uint32x4_t number = vceqq_f32(a.part[i], a.part[i]);
        const uint32x4_t all = vbslq_u32(number, rounded, vorrq_u32(bits, vdupq_n_u32(0x400000)));
        vst1_u16(reinterpret_cast<uint16_t*>(p) + 4 * i, vshrn_n_u32(all, 16));
    }
}
// GCC has no store past the caches.
template <typename T>
inline void stream(T* p, Vec a) {
    store(p, a);
}

// values[i * stride] for i = 0..15.
inline Vec gather(const float* p, int stride) {
    return each_part([=](int i) {
        const float* q = p + 4 * i * int64_t(stride);
        return float32x4_t{q[0], q[stride], q[2 * int64_t(stride)], q[3 * int64_t(stride)]};
    });
}
// values[index[i]] for i = 0..15, each index from 0 to 15.
inline Vec pick(const float* values, const int32_t* index) {
    return each_part([=](int i) {
        const int32_t* j = index + 4 * i;
        return float32x4_t{values[j[0]], values[j[1]], values[j[2]], values[j[3]]};
    });
}

// Bit i of the result: f(part) of lane i.
template <typename F>
inline uint32_t bits_of_lanes(F f) {
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits |= vaddvq_u32(vandq_u32(f(i), uint32x4_t{1, 2, 4, 8})) << (4 * i);
    return bits;
}
// Lane i >= 0. -0.0 is, a NaN is not.
inline uint32_t nonnegative(Vec a) {
    return bits_of_lanes([&](int i) { return vcgezq_f32(a.part[i]); });
}
inline uint32_t less(Vec a, Vec b) {
    return bits_of_lanes([&](int i) { return vcltq_f32(a.part[i], b.part[i]); });
}
// Lane i of a where bit i of the mask is set, else of b.
inline Vec select(uint32_t mask, Vec a, Vec b) {
    return each_part([&](int i) {
        const uint32x4_t chosen = vtstq_u32(vdupq_n_u32(mask >> (4 * i)), uint32x4_t{1, 2, 4, 8});
        return vbslq_f32(chosen, a.part[i], b.part[i]);
    });
}

// Sum of the lanes: 0 with 8, 1 with 9 ...; then 0 with 4 ...; then 0 with 2; then 0 with 1.
inline float sum(Vec a) {
    const Four all = vaddq_f32(vaddq_f32(a.part[0], a.part[2]), vaddq_f32(a.part[1], a.part[3]));
    return (all[0] + all[2]) + (all[1] + all[3]);
}
// The sums of four vectors' lanes: of each, lane i with i + 2, then with i + 1, within each group of four; then the
// groups 0 with 1 and 2 with 3, then both.
inline Four sums(Vec a, Vec b, Vec c, Vec d) {
    const Vec all = each_part([&](int i) {
        const auto of_two = [](float32x4_t x, float32x4_t y) {
            return vaddq_f32(vzip1q_f32(x, y), vzip2q_f32(x, y));  // x0 + x2, y0 + y2, x1 + x3, y1 + y3
        };
        const float64x2_t ab = vreinterpretq_f64_f32(of_two(a.part[i], b.part[i]));
        const float64x2_t cd = vreinterpretq_f64_f32(of_two(c.part[i], d.part[i]));
        return vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(ab, cd)), vreinterpretq_f32_f64(vzip2q_f64(ab, cd)));
    });
    return vaddq_f32(vaddq_f32(all.part[0], all.part[1]), vaddq_f32(all.part[2], all.part[3]));
}

}  // namespace mf
