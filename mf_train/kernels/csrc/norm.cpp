// LayerNorm and RMSNorm in the four steps of mf_train/model/norm_steps.py: two sums a token are exchanged between ranks
// after the first step of each direction. Sums are taken over chunks of features, then by pairs of chunks, so that a
// rank that holds a branch of that tree computes it with the same bits.

#include <cmath>

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

// Of 1, 2, 4 or 8 parts of `count` values each; overwrites them.
inline Moments merge_all(Moments* parts, int64_t left, float count, bool centred) {
    for (; left > 1; left /= 2, count *= 2) {
        for (int64_t i = 0; i < left / 2; ++i) parts[i] = merge(parts[2 * i], parts[2 * i + 1], count, centred);
    }
    return parts[0];
}

template <typename T>
inline Moments token_moments(const T* x, int64_t features, int64_t chunk, bool centred) {
    Moments parts[kMaxChunks];
    const int64_t chunks = features / chunk;
    for (int64_t c = 0; c < chunks; ++c) parts[c] = chunk_moments(x + c * chunk, chunk, centred);
    return merge_all(parts, chunks, float(chunk), centred);
}

template <typename T>
void moments(const T* x, int64_t tokens, int64_t features, int64_t chunk, bool centred, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
        const Moments own = token_moments(x + n * features, features, chunk, centred);
        out[2 * n] = own.mean;
        out[2 * n + 1] = own.squares;
    }
}

// The two sums of every token that each rank gave.
struct Gathered {
    const float* sums;  // [ranks, tokens, 2]; null where the sums of these features are all there is to add
    int64_t ranks, tokens;

    template <typename Sums>
    void read(int64_t n, Sums* parts) const {
        for (int64_t r = 0; r < ranks; ++r) parts[r] = {sums[2 * (r * tokens + n)], sums[2 * (r * tokens + n) + 1]};
    }
};

template <typename T, typename W>
void normalise(const T* x, Gathered gathered, const W* weight, const W* bias, int64_t features, int64_t chunk,
               bool centred, float epsilon, T* y, float* mean, float* rstd, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < gathered.tokens; ++n) {
        Moments parts[kMaxChunks], all;
        if (gathered.sums) {
            gathered.read(n, parts);
            all = merge_all(parts, gathered.ranks, float(features), centred);
        } else {
            all = token_moments(x + n * features, features, chunk, centred);
        }
        mean[n] = all.mean;
        rstd[n] = 1.0f / std::sqrt(all.squares / float(features * gathered.ranks) + epsilon);
        const Vec centre = broadcast(mean[n]), scale = broadcast(rstd[n]);
        for_each_vector(0, features, [&](int64_t i, int count) {
            const Vec normal = mul(sub(load_lanes(x + n * features + i, count), centre), scale);
            Vec value = mul(normal, load_lanes(weight + i, count));
            if (bias != nullptr) value = add(value, load_lanes(bias + i, count));
            store_lanes(y + n * features + i, value, count);
        });
    }
}

// Of dy * weight, and of dy * weight * (x - mean) * rstd.
struct GradientSums {
    float plain, with_normal;
};

inline GradientSums add_all(GradientSums* parts, int64_t left) {
    for (; left > 1; left /= 2) {
        for (int64_t i = 0; i < left / 2; ++i) {
            const GradientSums a = parts[2 * i], b = parts[2 * i + 1];
            parts[i] = {a.plain + b.plain, a.with_normal + b.with_normal};
        }
    }
    return parts[0];
}

template <typename T, typename W>
inline GradientSums token_gradient_sums(const T* dy, const T* x, float mean, float rstd, const W* weight,
                                        int64_t features, int64_t chunk) {
    GradientSums parts[kMaxChunks];
    const int64_t chunks = features / chunk;
    const Vec centre = broadcast(mean), scale = broadcast(rstd);
    for (int64_t c = 0; c < chunks; ++c) {
        Vec first = zero(), second = zero();
        for_each_vector(c * chunk, chunk, [&](int64_t i, int count) {
            const Vec scaled = mul(load_lanes(dy + i, count), load_lanes(weight + i, count));
            const Vec normal = mul(sub(load_lanes(x + i, count), centre), scale);
            first = add(first, scaled);
            second = fma(scaled, normal, second);  // scaled is zero in the lanes that do not count
        });
        parts[c] = {sum(first), sum(second)};
    }
    return add_all(parts, chunks);
}

template <typename T, typename W>
void gradient_sums(const T* dy, const T* x, const float* mean, const float* rstd, const W* weight, int64_t tokens,
                   int64_t features, int64_t chunk, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
        const int64_t at = n * features;
        const GradientSums own = token_gradient_sums(dy + at, x + at, mean[n], rstd[n], weight, features, chunk);
        out[2 * n] = own.plain;
        out[2 * n + 1] = own.with_normal;
    }
}

template <typename T, typename W>
struct Gradients {
    const T *dy, *x;
    const float *mean, *rstd;
    const W* weight;
    Gathered gathered;
    bool centred;
    int64_t features, chunk;
    T* dx;

    GradientSums sums(int64_t n) const {
        if (gathered.sums == nullptr) {
            const int64_t at = n * features;
            return token_gradient_sums(dy + at, x + at, mean[n], rstd[n], weight, features, chunk);
        }
        GradientSums parts[kMaxChunks];
        gathered.read(n, parts);
        return add_all(parts, gathered.ranks);
    }

    // dx of one block of tokens, and its part of d weight and d bias (float32, zeroed by the caller).
    void block(int64_t first, float* d_weight, float* d_bias) const {
        const float number = float(features * gathered.ranks);
        for (int64_t n = first; n < min(first + kTokensPerBlock, gathered.tokens); ++n) {
            const GradientSums all = sums(n);
            const Vec centre = broadcast(mean[n]), scale = broadcast(rstd[n]);
            const Vec plain = broadcast(centred ? all.plain / number : 0);
            const Vec with_normal = broadcast(all.with_normal / number);
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
    const int64_t blocks = ceil_div(gradients.gathered.tokens, kTokensPerBlock);
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

// y = (x - mean) * rstd * weight + bias, mean and rstd [tokens]; bias may be null. sums [ranks, tokens, 2]: every rank's
// mf_norm_moments; null, with ranks == 1, where these are all features.
void mf_norm_normalise(const void* x, int32_t type, const float* sums, int64_t ranks, const void* weight,
                       const void* bias, int32_t weight_type, int64_t tokens, int64_t features, int64_t chunk,
                       int32_t centred, float epsilon, void* y, float* mean, float* rstd, int32_t threads) {
    mf::with_floats(type, x, [&](auto* values) {
        mf::with_floats(weight_type, weight, [&](auto* factors) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
            mf::normalise(values, mf::Gathered{sums, ranks, tokens}, factors, static_cast<decltype(factors)>(bias),
                          features, chunk, centred != 0, epsilon, static_cast<T*>(y), mean, rstd, threads);
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

// dx [tokens, features]; d_weight and d_bias [features] float32. sums [ranks, tokens, 2]: every rank's
// mf_norm_gradient_sums; null, with ranks == 1, where these are all features.
int32_t mf_norm_gradients(const void* dy, const void* x, int32_t type, const float* mean, const float* rstd,
                          const void* weight, int32_t weight_type, const float* sums, int64_t ranks, int64_t tokens,
                          int64_t features, int64_t chunk, int32_t centred, void* dx, float* d_weight, float* d_bias,
                          int32_t threads) {
    return mf::with_floats(type, x, [&](auto* values) {
        return mf::with_floats(weight_type, weight, [&](auto* factors) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
            using W = std::remove_const_t<std::remove_pointer_t<decltype(factors)>>;
            const mf::Gradients<T, W> gradients{static_cast<const T*>(dy), values,        mean,     rstd,  factors,
                                                {sums, ranks, tokens},        centred != 0, features, chunk,
                                                static_cast<T*>(dx)};
            return mf::backward(gradients, d_weight, d_bias, threads);
        });
    });
}

}  // extern "C"
