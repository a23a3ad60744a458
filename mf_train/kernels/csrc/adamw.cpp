// AdamW in one pass over numbers whose moments are held in fewer bytes: what mf_train/parallel/stored.py holds and
// mf_train/parallel/adamw.py computes, a unit of numbers at a time. What is written here is one IEEE operation a step,
// and sums and random bits depend on the unit alone, so neither threads nor instruction sets change a bit.

#include <cmath>
#include <cstring>

#include "operation.h"

namespace mf {

// As cpu_adamw.py passes them.
struct Rates {
    float keep;           // 1 - learning rate * weight decay
    float rate;           // learning rate / (1 - beta1^step)
    float new_share;      // 1 - beta1
    float beta2;
    float new_square;     // 1 - beta2
    float root_of_share;  // sqrt(1 - beta2^step)
    float epsilon;
};
// Where random bits come from (mf_train/parallel/stored.py, `Draw`).
struct Draw {
    uint32_t low, high;
    int64_t begin, mine, units, first;
};

namespace {

enum Kind : int32_t { kHeldFloat32 = 0, kHeldBfloat16 = 1, kHeldInt8 = 2, kHeldRow = 3, kHeldSplit = 4 };

// lowbias32 of C. Wellons.
inline uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}
inline uint32_t key_of(const Draw& draw, int64_t unit) {
    const int64_t own = draw.begin + unit;
    const int64_t place = own / draw.mine * draw.units + own % draw.mine + draw.first;
    return mix(mix(uint32_t(place) + draw.low) + draw.high);
}

// Of values that are not negative, or NaN.
inline float largest_of(const float* values, int64_t count) {
    int32_t largest = 0;  // they are in the order of their bits, a NaN above all
    for (int64_t i = 0; i < count; ++i) {
        const int32_t bits = int32_t(bits_of(values[i]) & 0x7fffffffu);
        largest = bits > largest ? bits : largest;
    }
    return float_of(uint32_t(largest));
}

// How numbers are held. `read` turns a unit into floats; `write` holds it, with the random bits of each number.
struct Float32 {
    static constexpr bool kRounds = false;
    float* values;
    void read(int64_t at, int64_t count, float* out) const { std::memcpy(out, values + at, size_t(count) * 4); }
    void write(int64_t at, int64_t count, const float* from, const uint32_t*) const {
        std::memcpy(values + at, from, size_t(count) * 4);
    }
};

template <int shift>  // of the bits that belong to this moment
struct Bfloat16 {
    static constexpr bool kRounds = true;
    uint16_t* values;
    void read(int64_t at, int64_t count, float* out) const {
        for (int64_t i = 0; i < count; ++i) out[i] = float_of(uint32_t(values[at + i]) << 16);
    }
    void write(int64_t at, int64_t count, const float* from, const uint32_t* random) const {
        for (int64_t i = 0; i < count; ++i) {
            values[at + i] = uint16_t((bits_of(from[i]) + (random[i] >> shift & 0xffffu)) >> 16);
        }
    }
};

// The shares of a unit's largest magnitude that codes stand for: of either sign, k |k| / 127^2; or not negative,
// (k / 255)^4, where only 0 is held as 0.
template <typename Code>
struct Power {
    static constexpr bool kSigned = std::is_same_v<Code, int8_t>;
    static constexpr float kMost = kSigned ? 127 : 255;
    static float raise(float k) { return kSigned ? k * std::fabs(k) : (k * k) * (k * k); }
    static float root(float share) { return kSigned ? std::sqrt(share) : std::sqrt(std::sqrt(share)); }
};

// Apart from its caller: GCC 12 makes no vectors of the loop where it is inlined.
template <typename Code, int shift>
__attribute__((noinline)) void write_codes(Code* codes, float largest, int64_t count, const float* from,
                                           const uint32_t* random) {
    using Of = Power<Code>;
    const float divisor = largest > std::numeric_limits<float>::min() ? largest : std::numeric_limits<float>::min();
    for (int64_t i = 0; i < count; ++i) {
        const float share = std::fabs(from[i]) / divisor;
        float k = std::floor(Of::root(share) * Of::kMost);
        const float below = Of::raise(k / Of::kMost), above = Of::raise((k + 1) / Of::kMost);
        const float chance = (share - below) / (above - below) * 65536;
        k += float(int32_t(random[i] >> shift & 0xffffu)) < chance ? 1.0f : 0.0f;
        k = k < Of::kMost ? k : Of::kMost;
        if constexpr (Of::kSigned) {
            codes[i] = Code(int32_t(std::copysign(k, from[i])));
        } else {
            const float least = from[i] > 0 ? 1.0f : 0.0f;
            codes[i] = Code(int32_t(k > least ? k : least));
        }
    }
}

template <typename Code, int shift>
struct Int8 {
    static constexpr bool kRounds = true;
    Code* codes;
    float* largest;
    int64_t unit;
    void read(int64_t at, int64_t count, float* out) const {
        const float most = largest[at / unit];
        for (int64_t i = 0; i < count; ++i) {
            out[i] = Power<Code>::raise(float(codes[at + i]) * (1 / Power<Code>::kMost)) * most;
        }
    }
    void write(int64_t at, int64_t count, const float* from, const uint32_t* random) const {
        largest[at / unit] = largest_of(from, count);
        write_codes<Code, shift>(codes + at, largest[at / unit], count, from, random);
    }
};

// A master as the bfloat16 weight nearest to it and what it lacks.
struct Split {
    static constexpr bool kRounds = false;
    uint16_t* weights;
    int16_t* left;
    void read(int64_t at, int64_t count, float* out) const {
        for (int64_t i = 0; i < count; ++i) {
            out[i] = float_of((uint32_t(weights[at + i]) << 16) + uint32_t(int32_t(left[at + i])));
        }
    }
    void write(int64_t at, int64_t count, const float* from, const uint32_t*) const {
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t bits = bits_of(from[i]);
            const uint32_t nearest = bits + 0x7fffu + (bits >> 16 & 1);  // the even one of two
            const uint32_t weight = (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : nearest;  // a NaN stays one
            const int32_t lacks = int32_t(bits - (weight & 0xffff0000u));
            weights[at + i] = uint16_t(weight >> 16);
            left[at + i] = int16_t(lacks < -32768 ? -32768 : lacks > 32767 ? 32767 : lacks);
        }
    }
};

struct Row {
    static constexpr bool kRounds = false;
    float* means;
    int64_t unit;
};

inline float mean_square(const float* gradient, int64_t count) {
    float sums[kLanes] = {};
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        for (int64_t j = 0; j < kLanes; ++j) sums[j] += gradient[i + j] * gradient[i + j];
    }
    for (int64_t j = 0; j < count - whole; ++j) sums[j] += gradient[whole + j] * gradient[whole + j];
    return sum(load(sums)) / float(count);
}

template <typename Master, typename First, typename Second>
struct Update {
    const float* gradient;
    Master master;
    First first;
    Second second;
    Rates rates;
    Draw draw;

    // scratch: 4 arrays of `count`
    void unit(int64_t number, int64_t count, float* scratch) const {
        const int64_t at = number * count;
        const float* g = gradient + at;
        float *m = scratch, *v = scratch + count, *p = scratch + 2 * count;
        uint32_t* random = reinterpret_cast<uint32_t*>(scratch + 3 * count);
        if (First::kRounds || Second::kRounds) {
            const uint32_t key = key_of(draw, number);
            for (int64_t i = 0; i < count; ++i) random[i] = mix(key + uint32_t(i) * 0x9e3779b9u);
        }
        first.read(at, count, m);
        for (int64_t i = 0; i < count; ++i) m[i] = m[i] + (g[i] - m[i]) * rates.new_share;
        first.write(at, count, m, random);
        master.read(at, count, p);
        if constexpr (std::is_same_v<Second, Row>) {
            float& mean = second.means[number];
            mean = mean * rates.beta2 + mean_square(g, count) * rates.new_square;
            const float root = std::sqrt(mean) / rates.root_of_share + rates.epsilon;
            for (int64_t i = 0; i < count; ++i) p[i] = p[i] * rates.keep - rates.rate * m[i] / root;
        } else {
            second.read(at, count, v);
            for (int64_t i = 0; i < count; ++i) v[i] = v[i] * rates.beta2 + g[i] * g[i] * rates.new_square;
            for (int64_t i = 0; i < count; ++i) {
                const float root = std::sqrt(v[i]) / rates.root_of_share + rates.epsilon;
                p[i] = p[i] * rates.keep - rates.rate * m[i] / root;
            }
            second.write(at, count, v, random);
        }
        master.write(at, count, p, random);
    }

    int32_t all(int64_t units, int64_t count, int threads) const {
        threads = useful_threads(threads, units * count * 12);
        Buffer<float> scratch(threads * 4 * count);
        if (!scratch.ok()) return kNoMemory;
        const int64_t each = ceil_div(units, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int t = 0; t < threads; ++t) {
            for (int64_t u = t * each; u < min((t + 1) * each, units); ++u) {
                unit(u, count, scratch.get() + t * 4 * count);
            }
        }
        return kDone;
    }
};

}  // namespace
}  // namespace mf

// gradient float32 [units * unit]. Each of master, first and second moment: how it is held, its numbers, and what is
// held beside them (the largest of a unit, the rest of a split master) or null. `draw` is read where one is rounded.
extern "C" int32_t mf_adamw(const float* gradient, int32_t master_kind, void* master, void* master_rest,
                            int32_t first_kind, void* first, float* first_largest, int32_t second_kind, void* second,
                            float* second_largest, int64_t units, int64_t unit, const void* rates, const void* draw,
                            int32_t threads) {
    using namespace mf;
    const Rates& given_rates = *static_cast<const Rates*>(rates);
    const Draw& given_draw = *static_cast<const Draw*>(draw);
    const auto with_all = [&](auto held, auto average, auto square) {
        const Update<decltype(held), decltype(average), decltype(square)> update{gradient, held,        average,
                                                                                 square,   given_rates, given_draw};
        return update.all(units, unit, threads);
    };
    const auto with_first = [&](auto held, auto average) {
        switch (second_kind) {
            case kHeldFloat32: return with_all(held, average, Float32{static_cast<float*>(second)});
            case kHeldBfloat16: return with_all(held, average, Bfloat16<16>{static_cast<uint16_t*>(second)});
            case kHeldInt8:
                return with_all(held, average, Int8<uint8_t, 16>{static_cast<uint8_t*>(second), second_largest, unit});
            default: return with_all(held, average, Row{static_cast<float*>(second), unit});
        }
    };
    const auto with_master = [&](auto held) {
        switch (first_kind) {
            case kHeldFloat32: return with_first(held, Float32{static_cast<float*>(first)});
            case kHeldBfloat16: return with_first(held, Bfloat16<0>{static_cast<uint16_t*>(first)});
            default: return with_first(held, Int8<int8_t, 0>{static_cast<int8_t*>(first), first_largest, unit});
        }
    };
    if (master_kind == kHeldSplit) {
        return with_master(Split{static_cast<uint16_t*>(master), static_cast<int16_t*>(master_rest)});
    }
    return with_master(Float32{static_cast<float*>(master)});
}
