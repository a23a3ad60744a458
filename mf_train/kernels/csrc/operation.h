// What the operations share: element types by number, scratch memory, the check of codes, the split of work.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace mf {

// The numbers that cpu.py passes for dtypes.
enum FloatType : int32_t { kFloat32 = 0, kBfloat16 = 1 };
enum CodeType : int32_t { kUint8 = 0, kInt16 = 1, kInt32 = 2, kInt64 = 3 };

// What every operation returns. The decoder's codes are its own; out of range are tokens.
enum Status : int32_t { kDone = 0, kCodeOutOfRange = 1, kNoMemory = 2 };

constexpr int64_t kCacheLine = 64;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f with the array in its type.
template <typename F>
inline auto with_floats(int32_t type, const void* p, F f) {
    return type == kFloat32 ? f(static_cast<const float*>(p)) : f(static_cast<const bf16*>(p));
}
template <typename F>
inline auto with_codes(int32_t type, const void* p, F f) {
    switch (type) {
        case kUint8: return f(static_cast<const uint8_t*>(p));
        case kInt16: return f(static_cast<const int16_t*>(p));
        case kInt32: return f(static_cast<const int32_t*>(p));
        default: return f(static_cast<const int64_t*>(p));
    }
}

// Scratch memory, aligned to cache lines, uninitialised; `ok()` is false where there was none.
template <typename T>
class Buffer {
public:
    explicit Buffer(int64_t count)
        : data_(static_cast<T*>(std::aligned_alloc(
              kCacheLine, size_t(ceil_div(max(count, 1) * int64_t(sizeof(T)), kCacheLine) * kCacheLine)))) {}
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    bool ok() const { return data_ != nullptr; }
    T* get() const { return data_; }

private:
    T* data_;
};

// All of a vector, or its first lanes: `count` of them.
template <typename T>
inline Vec load_lanes(const T* p, int count) {
    return count == kLanes ? load(p) : load(p, count);
}
template <typename T>
inline void store_lanes(T* p, Vec a, int count) {
    if (count == kLanes) {
        store(p, a);
    } else {
        store(p, a, count);
    }
}

// Whether all codes are in [0, rows). Costs nothing where the type holds no other number.
template <typename Code>
inline bool in_range(const Code* codes, int64_t count, int64_t rows) {
    using Unsigned = std::make_unsigned_t<Code>;
    if (uint64_t(rows - 1) >= uint64_t(std::numeric_limits<Unsigned>::max())) return true;
    Unsigned largest = 0;  // a negative code is a large unsigned one
    for (int64_t i = 0; i < count; ++i) {
        const Unsigned code = Unsigned(codes[i]);
        largest = code > largest ? code : largest;
    }
    return largest < Unsigned(rows);
}

// A weight as the lookup uses it: rounded to the tables' type.
template <typename Table, typename Weight>
inline float rounded_weight(Weight weight) {
    if (std::is_same_v<Table, bf16>) return to_float(to_bf16(to_float(weight)));
    return to_float(weight);
}

// Calls f with a number of vectors, from 1 to 9, that the compiler knows.
template <typename F>
inline void with_vecs(int vecs, F f) {
    switch (vecs) {
        case 1: return f(std::integral_constant<int, 1>());
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        case 4: return f(std::integral_constant<int, 4>());
        case 5: return f(std::integral_constant<int, 5>());
        case 6: return f(std::integral_constant<int, 6>());
        case 7: return f(std::integral_constant<int, 7>());
        case 8: return f(std::integral_constant<int, 8>());
        default: return f(std::integral_constant<int, 9>());
    }
}

// The sizes of a lookup.
struct Shape {
    int64_t tokens, tables, rows;
    int64_t reads() const { return tokens * tables; }
};

// How many threads `bytes` of traffic are worth: below a few hundred KiB a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 64 * 1024;
inline int useful_threads(int threads, int64_t bytes) { return int(max(1, min(threads, bytes / kBytesPerThread))); }

}  // namespace mf
