// LayerNorm and RMSNorm in the four steps of mf_train/model/norm_steps.py: two sums a token are exchanged between ranks
// after the first step of each direction. Sums are taken over chunks of features, then by pairs of chunks, so that a
// rank that holds a branch of that tree computes it with the same bits.

#include "operation.h"

namespace mf {
namespace {

constexpr int kMaxChunks = 8;
constexpr int64_t kTokensPerBlock = 64;  // d weight is summed within blocks of tokens, then over blocks in order

struct Moments {
    float mean;
    float squares;
};

// f(index, vector of x from there, lanes that count) over [first, first + count).
template <typename F>
inline void for_each_vector(int64_t first, int64_t count, F f) {
    for (int64_t i = 0; i < count; i += kLanes) f(first + i, int(min(kLanes, count - i)));
}

// The lanes from `count` on set to zero.
inline Vec first_lanes(Vec value, int count) { return select((1u << count) - 1, value, zero()); }

template <typename T>
inline Moments chunk_moments(const T* x, int64_t chunk, bool centred) {
    float mean = 0;
    if (centred) {
        Vec total = zero();
        for_each_vector(0, chunk, [&](int64_t i, int count) { total = add(total, load_lanes(x + i, count)); });
        mean = sum(total) / float(chunk);
    }
    Vec squares = zero();
    for_each_vector(0, chunk, [&](int64_t i, int count) {
        const Vec deviation = first_lanes(sub(load_lanes(x + i, count), broadcast(mean)), count);
        squares = fma(deviation, deviation, squares);
    });
    return {mean, sum(squares)};
}

// Chan, Golub and LeVeque's update for two parts of `count` values each.
inline Moments merge(Moments a, Moments b, float count, bool centred) {
    const float difference = b.mean - a.mean;
    const float squares = a.squares + b.squares;
    if (!centred) return {0, squares};
    return {(a.mean + b.mean) / 2, squares + difference * difference * (count / 2)};
}

template <typename T>
void moments(const T* x, int64_t tokens, int64_t features, int64_t chunk, bool centred, float* out, int threads) {
    const int64_t chunks = features / chunk;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
        Moments parts[kMaxChunks];
        for (int64_t c = 0; c < chunks; ++c) parts[c] = chunk_moments(x + n * features + c * chunk, chunk, centred);
        float count = float(chunk);
        for (int64_t left = chunks; left > 1; left /= 2, count *= 2) {
            for (int64_t c = 0; c < left / 2; ++c) parts[c] = merge(parts[2 * c], parts[2 * c + 1], count, centred);
        }
        out[2 * n] = parts[0].mean;
        out[2 * n + 1] = parts[0].squares;
    }
}

template <typename T, typename W>
void normalise(const T* x, const float* mean, const float* rstd, const W* weight, const W* bias, int64_t tokens,
               int64_t features, T* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
        const Vec centre = broadcast(mean[n]), scale = broadcast(rstd[n]);
        for_each_vector(0, features, [&](int64_t i, int count) {
            const Vec normal = mul(sub(load_lanes(x + n * features + i, count), centre), scale);
            Vec value = mul(normal, load_lanes(weight + i, count));
            if (bias != nullptr) value = add(value, load_lanes(bias + i, count));
            store_lanes(y + n * features + i, value, count);
        });
    }
}

// Over this rank's features: sum of dy * weight, and sum of dy * weight * (x - mean) * rstd.
template <typename T, typename W>
void gradient_sums(const T* dy, const T* x, const float* mean, const float* rstd, const W* weight, int64_t tokens,
                   int64_t features, int64_t chunk, float* out, int threads) {
    const int64_t chunks = features / chunk;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
        float plain[kMaxChunks], with_normal[kMaxChunks];
        const Vec centre = broadcast(mean[n]), scale = broadcast(rstd[n]);
        for (int64_t c = 0; c < chunks; ++c) {
            Vec first = zero(), second = zero();
            for_each_vector(c * chunk, chunk, [&](int64_t i, int count) {
                const int64_t at = n * features + i;
                const Vec scaled = mul(load_lanes(dy + at, count), load_lanes(weight + i, count));
                const Vec normal = mul(sub(load_lanes(x + at, count), centre), scale);
                first = add(first, scaled);
                second = fma(scaled, normal, second);  // scaled is zero in the lanes that do not count
            });
            plain[c] = sum(first);
            with_normal[c] = sum(second);
        }
        for (int64_t left = chunks; left > 1; left /= 2) {
            for (int64_t c = 0; c < left / 2; ++c) {
                plain[c] = plain[2 * c] + plain[2 * c + 1];
                with_normal[c] = with_normal[2 * c] + with_normal[2 * c + 1];
            }
        }
        out[2 * n] = plain[0];
        out[2 * n + 1] = with_normal[0];
    }
}

template <typename T, typename W>
struct Gradients {
    const T *dy, *x;
    const float *mean, *rstd;
    const W* weight;
    const float* sums;  // of all features, divided by their number
    bool centred;
    int64_t tokens, features;
    T* dx;

    // dx of one block of tokens, and its part of d weight and d bias (float32, zeroed by the caller).
    void block(int64_t first, float* d_weight, float* d_bias) const {
        for (int64_t n = first; n < min(first + kTokensPerBlock, tokens); ++n) {
            const Vec centre = broadcast(mean[n]), scale = broadcast(rstd[n]);
            const Vec plain = broadcast(centred ? sums[2 * n] : 0), with_normal = broadcast(sums[2 * n + 1]);
            for_each_vector(0, features, [&](int64_t i, int count) {
                const int64_t at = n * features + i;
                const Vec gradient = load_lanes(dy + at, count);
                const Vec normal = mul(sub(load_lanes(x + at, count), centre), scale);
                Vec value = sub(mul(gradient, load_lanes(weight + i, count)), mul(normal, with_normal));
                if (centred) value = sub(value, plain);
                store_lanes(dx + at, mul(value, scale), count);
                store_lanes(d_weight + i, fma(gradient, normal, load_lanes(d_weight + i, count)), count);
                store_lanes(d_bias + i, add(gradient, load_lanes(d_bias + i, count)), count);
            });
        }
    }
};

template <typename T, typename W>
int32_t backward(const Gradients<T, W>& gradients, float* d_weight, float* d_bias, int threads) {
    const int64_t features = gradients.features;
    const int64_t blocks = ceil_div(gradients.tokens, kTokensPerBlock);
    Buffer<float> partial(2 * blocks * features);
    if (!partial.ok()) return kNoMemory;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        float* sums = partial.get() + 2 * b * features;
        for (int64_t i = 0; i < 2 * features; ++i) sums[i] = 0;
        gradients.block(b * kTokensPerBlock, sums, sums + features);
    }
    for (int64_t i = 0; i < features; ++i) d_weight[i] = d_bias[i] = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        const float* sums = partial.get() + 2 * b * features;
        for (int64_t i = 0; i < features; ++i) d_weight[i] += sums[i];
        for (int64_t i = 0; i < features; ++i) d_bias[i] += sums[features + i];
    }
    return kDone;
}

}  // namespace
}  // namespace mf

extern "C" {

// x [tokens, features] -> out [tokens, 2] float32: mean and sum of squared deviations; for centred == 0 the deviations
// are from zero and the mean is zero. features = chunk times 1, 2, 4 or 8.
void mf_norm_moments(const void* x, int32_t type, int64_t tokens, int64_t features, int64_t chunk, int32_t centred,
                     float* out, int32_t threads) {
    mf::with_floats(type, x, [&](auto* values) {
        mf::moments(values, tokens, features, chunk, centred != 0, out, threads);
    });
}

// y = (x - mean) * rstd * weight + bias; bias may be null.
void mf_norm_normalise(const void* x, int32_t type, const float* mean, const float* rstd, const void* weight,
                       const void* bias, int32_t weight_type, int64_t tokens, int64_t features, void* y,
                       int32_t threads) {
    mf::with_floats(type, x, [&](auto* values) {
        mf::with_floats(weight_type, weight, [&](auto* factors) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
            mf::normalise(values, mean, rstd, factors, static_cast<decltype(factors)>(bias), tokens, features,
                          static_cast<T*>(y), threads);
        });
    });
}

// out [tokens, 2] float32: sums over features of dy * weight and of dy * weight * (x - mean) * rstd.
void mf_norm_gradient_sums(const void* dy, const void* x, int32_t type, const float* mean, const float* rstd,
                           const void* weight, int32_t weight_type, int64_t tokens, int64_t features, int64_t chunk,
                           float* out, int32_t threads) {
    mf::with_floats(type, x, [&](auto* values) {
        mf::with_floats(weight_type, weight, [&](auto* factors) {
            mf::gradient_sums(static_cast<decltype(values)>(dy), values, mean, rstd, factors, tokens, features, chunk,
                              out, threads);
        });
    });
}

// dx [tokens, features]; d_weight and d_bias [features] float32. sums [tokens, 2]: mf_norm_gradient_sums' of all
// ranks, added and divided by the number of all features.
int32_t mf_norm_gradients(const void* dy, const void* x, int32_t type, const float* mean, const float* rstd,
                          const void* weight, int32_t weight_type, const float* sums, int32_t centred, int64_t tokens,
                          int64_t features, void* dx, float* d_weight, float* d_bias, int32_t threads) {
    return mf::with_floats(type, x, [&](auto* values) {
        return mf::with_floats(weight_type, weight, [&](auto* factors) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
            using W = std::remove_const_t<std::remove_pointer_t<decltype(factors)>>;
            const mf::Gradients<T, W> gradients{static_cast<const T*>(dy), values, mean, rstd, factors, sums,
                                                centred != 0, tokens, features, static_cast<T*>(dx)};
            return mf::backward(gradients, d_weight, d_bias, threads);
        });
    });
}

}  // extern "C"
