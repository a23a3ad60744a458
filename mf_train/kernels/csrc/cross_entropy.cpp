// Cross-entropy over a vocabulary that may be split over ranks, in the three steps of mf_train/model/loss_steps.py:
// a maximum and a sum a token are exchanged between ranks after the first two.

#include <limits>

#include "operation.h"

namespace mf {
namespace {

constexpr int kMaxChunks = 8;

template <typename T>
void largest(const T* logits, int64_t tokens, int64_t vocabulary, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
        const T* row = logits + n * vocabulary;
        Vec most = broadcast(to_float(row[0]));
        for (int64_t v = 0; v < vocabulary; v += kLanes) {
            const int64_t left = vocabulary - v;
            const uint32_t count = left >= kLanes ? 0xffffu : (1u << left) - 1;
            const Vec value = load_lanes(row + v, int(min(left, kLanes)));
            most = select(less(most, value) & count, value, most);
        }
        float lanes[kLanes];
        store(lanes, most);
        float result = lanes[0];
        for (float lane : lanes) result = lane > result ? lane : result;
        out[n] = result;
    }
}

// A chunk at a time, then by pairs of chunks.
template <typename T>
void exp_sums(const T* logits, const float* most, int64_t tokens, int64_t vocabulary, int64_t chunk, float* out,
              int threads) {
    const int64_t chunks = vocabulary / chunk;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
        float parts[kMaxChunks];
        const Vec shift = broadcast(most[n]);
        for (int64_t c = 0; c < chunks; ++c) {
            const T* row = logits + n * vocabulary + c * chunk;
            Vec total = zero();
            for (int64_t v = 0; v < chunk; v += kLanes) {
                const int64_t left = chunk - v;
                Vec value = exp_nonpositive(sub(load_lanes(row + v, int(min(left, kLanes))), shift));
                if (left < kLanes) value = select((1u << left) - 1, value, zero());
                total = add(total, value);
            }
            parts[c] = sum(total);
        }
        for (int64_t left = chunks; left > 1; left /= 2) {
            for (int64_t c = 0; c < left / 2; ++c) parts[c] = parts[2 * c] + parts[2 * c + 1];
        }
        out[n] = parts[0];
    }
}

// (softmax - one at the target) * gradient. target < 0: the target is not among these logits.
template <typename T>
void gradient(const T* logits, const float* normaliser, const float* factor, const int64_t* target, int64_t tokens,
              int64_t vocabulary, T* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
        const T* row = logits + n * vocabulary;
        T* result = out + n * vocabulary;
        const Vec shift = broadcast(normaliser[n]), scale = broadcast(factor[n]);
        for (int64_t v = 0; v < vocabulary; v += kLanes) {
            const int64_t left = vocabulary - v;
            const Vec value = mul(exp_nonpositive(sub(load_lanes(row + v, int(min(left, kLanes))), shift)), scale);
            store_lanes(result + v, value, int(min(left, kLanes)));
        }
        if (target[n] >= 0) {
            const Vec at_target = sub(load(row + target[n], 1), shift);
            float lanes[kLanes];
            store(lanes, sub(mul(exp_nonpositive(at_target), scale), scale));
            from_float(lanes[0], result + target[n]);
        }
    }
}

}  // namespace
}  // namespace mf

extern "C" {

// logits [tokens, vocabulary], vocabulary at least 1 -> the largest of each token, float32.
void mf_loss_largest(const void* logits, int32_t type, int64_t tokens, int64_t vocabulary, float* out,
                     int32_t threads) {
    mf::with_floats(type, logits, [&](auto* values) { mf::largest(values, tokens, vocabulary, out, threads); });
}

// Sum of exp(logit - largest) of each token; vocabulary = chunk times 1, 2, 4 or 8.
void mf_loss_exp_sums(const void* logits, int32_t type, const float* largest, int64_t tokens, int64_t vocabulary,
                      int64_t chunk, float* out, int32_t threads) {
    mf::with_floats(type, logits, [&](auto* values) {
        mf::exp_sums(values, largest, tokens, vocabulary, chunk, out, threads);
    });
}

// d logits: (exp(logit - normaliser) - [at target]) * factor, factor being the gradient of the token's loss.
void mf_loss_gradient(const void* logits, int32_t type, const float* normaliser, const float* factor,
                      const int64_t* target, int64_t tokens, int64_t vocabulary, void* out, int32_t threads) {
    mf::with_floats(type, logits, [&](auto* values) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
        mf::gradient(values, normaliser, factor, target, tokens, vocabulary, static_cast<T*>(out), threads);
    });
}

}  // extern "C"
