// The types of numbers that the operations read and write, and how many of them a vector has.
#pragma once

#include <cstdint>
#include <cstring>

namespace mf {

constexpr int kLanes = 16;

struct bf16 {
    uint16_t bits;
};

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return float_of(uint32_t(value.bits) << 16); }

// Round to nearest even; a NaN stays one.
inline bf16 to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

inline void from_float(float value, float* out) { *out = value; }
inline void from_float(float value, bf16* out) { *out = to_bf16(value); }

}  // namespace mf
