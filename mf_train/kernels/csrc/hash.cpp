// Hash (Eq. 2-4, 10) and its backward pass. A lane of a vector is a chunk of tau values, so a chunk's result depends
// on its own values alone: not on where it stands, how many there are, or how many threads work.

#include "operation.h"

namespace mf {
namespace {

constexpr int kMaxBits = 16;

struct Settings {
    int tau;
    float temperature;
    bool scaled;
};

// Values as signs, magnitudes and exp(-2|z|/t).
struct Values {
    uint32_t bits;  // of the lanes that are >= 0
    Vec magnitude, decay;
};

inline Values read_values(Vec z, Vec rate) {
    const uint32_t bits = nonnegative(z);
    const Vec magnitude = select(bits, z, negate(z));
    return {bits, magnitude, exp_nonpositive(mul(magnitude, rate))};
}

// Of sixteen chunks, one a lane: 1 / probability, which is the product over i, in order, of 1 + exp(-2|z_i|/t); the sum
// of |z_i|; and the code as float32, exact for 16 bits.
struct Chunks {
    Vec one_over_probability, total, code;
};

inline Chunks read_chunks(const float* z, const Settings& settings) {
    const Vec rate = broadcast(-2.0f / settings.temperature);
    const Vec one = broadcast(1.0f);
    Chunks chunks{one, zero(), zero()};
    for (int i = 0; i < settings.tau; ++i) {
        const Values values = read_values(gather(z + i, settings.tau), rate);
        chunks.one_over_probability = mul(chunks.one_over_probability, add(one, values.decay));
        chunks.total = add(chunks.total, values.magnitude);
        chunks.code = add(chunks.code, select(values.bits, broadcast(float(1 << i)), zero()));
    }
    return chunks;
}

// Chunks [first, first + count) as float32, with 16 tau values to read: the array itself, or a padded copy.
template <typename T>
inline const float* chunk_values(const T* x, int64_t first, int count, int tau, float* copy) {
    const T* z = x + first * tau;
    if constexpr (std::is_same_v<T, float>) {
        if (count == kLanes) return z;
    }
    const int size = count * tau;
    for (int i = 0; i < kLanes * tau; i += kLanes) {
        store(copy + i, i + kLanes <= size ? load(z + i) : load(z + i, int(max(0, min(kLanes, size - i)))));
    }
    return copy;
}

template <typename Code>
inline void write_codes(Code* codes, Vec code, int count) {
    float values[kLanes];
    store(values, code);
    if (count == kLanes) {  // a number of its own, so that the compiler writes one vector
        for (int j = 0; j < kLanes; ++j) codes[j] = Code(int32_t(values[j]));
    } else {
        for (int j = 0; j < count; ++j) codes[j] = Code(int32_t(values[j]));
    }
}

template <typename T, typename Code>
void hash(const T* x, int64_t count, const Settings& settings, Code* codes, T* weights, int threads) {
    const int64_t groups = ceil_div(count, kLanes);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
        alignas(64) float copy[kLanes * kMaxBits];
        const int64_t first = group * kLanes;
        const int valid = int(min(kLanes, count - first));
        const Chunks chunks = read_chunks(chunk_values(x, first, valid, settings.tau, copy), settings);
        Vec weight = div(broadcast(1.0f), chunks.one_over_probability);
        if (settings.scaled) weight = mul(weight, chunks.total);
        write_codes(codes + first, chunks.code, valid);
        store_lanes(weights + first, weight, valid);
    }
}

// d z_i = sign(z_i) d weight probability slope_i with slope_i = (2/t) (1 - sigmoid(2|z_i|/t)); for the scaled score
// slope_i total + 1 stands for slope_i. The first pass over sixteen chunks has a chunk in each lane, for the products; the
// second takes the values as they lie in memory and computes exp again, which is cheaper than to transpose.
template <typename T>
void hash_backward(const T* d_weights, const T* x, int64_t count, const Settings& settings, T* dx, int threads) {
    const int64_t groups = ceil_div(count, kLanes);
    const int tau = settings.tau;
    int32_t chunk_of[kLanes * kMaxBits];
    for (int i = 0; i < kLanes * tau; ++i) chunk_of[i] = i / tau;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
        alignas(64) float copy[kLanes * kMaxBits];
        alignas(64) float d_probability[kLanes], total[kLanes];
        const Vec rate = broadcast(-2.0f / settings.temperature);
        const Vec two_over_t = broadcast(2.0f / settings.temperature);
        const Vec one = broadcast(1.0f);
        const int64_t first = group * kLanes;
        const int valid = int(min(kLanes, count - first));
        const float* z = chunk_values(x, first, valid, tau, copy);
        const Chunks chunks = read_chunks(z, settings);
        store(d_probability, div(load_lanes(d_weights + first, valid), chunks.one_over_probability));
        store(total, chunks.total);
        for (int i = 0; i < valid * tau; i += kLanes) {
            const Values values = read_values(load(z + i), rate);
            Vec slope = mul(div(values.decay, add(one, values.decay)), two_over_t);
            if (settings.scaled) slope = fma(slope, pick(total, chunk_of + i), one);
            const Vec d_magnitude = mul(slope, pick(d_probability, chunk_of + i));
            const Vec d_value = select(values.bits, d_magnitude, negate(d_magnitude));
            store_lanes(dx + first * tau + i, d_value, int(min(kLanes, valid * tau - i)));
        }
    }
}

template <typename T>
void hash_any_code(const T* x, int64_t count, const Settings& settings, void* codes, void* weights, int threads) {
    T* out = static_cast<T*>(weights);
    if (settings.tau <= 8) return hash(x, count, settings, static_cast<uint8_t*>(codes), out, threads);
    if (settings.tau <= 15) return hash(x, count, settings, static_cast<int16_t*>(codes), out, threads);
    return hash(x, count, settings, static_cast<int32_t*>(codes), out, threads);
}

}  // namespace
}  // namespace mf

// x: `count` chunks of tau values of `type`, one after the other. codes: uint8 for tau <= 8, int16 for tau <= 15, int32
// for 16. weights: x's type.
extern "C" void mf_hash(const void* x, int32_t type, int64_t count, int32_t tau, float temperature, int32_t scaled,
                        void* codes, void* weights, int32_t threads) {
    using namespace mf;
    const Settings settings{tau, temperature, scaled != 0};
    threads = useful_threads(threads, count * tau * 16);
    with_floats(type, x, [&](auto* values) { hash_any_code(values, count, settings, codes, weights, threads); });
}

// d_weights [count] and dx [count, tau] have x's type.
extern "C" void mf_hash_backward(const void* d_weights, const void* x, int32_t type, int64_t count, int32_t tau,
                                 float temperature, int32_t scaled, void* dx, int32_t threads) {
    using namespace mf;
    const Settings settings{tau, temperature, scaled != 0};
    threads = useful_threads(threads, count * tau * 16);
    with_floats(type, x, [&](auto* values) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
        hash_backward(static_cast<const T*>(d_weights), values, count, settings, static_cast<T*>(dx), threads);
    });
}
