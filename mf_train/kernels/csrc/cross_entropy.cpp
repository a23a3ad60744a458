// Cross-entropy over a vocabulary that may be split over ranks, in the two steps of mf_train/model/loss_steps.py:
// three values a chunk are exchanged between ranks after the first.

#include <limits>

#include "operation.h"

namespace mf {
namespace {

template <typename T>
float largest_of(const T* row, int64_t size) {
    Vec most = broadcast(std::numeric_limits<float>::lowest());
    for (int64_t v = 0; v < size; v += kLanes) {
        const int64_t left = size - v;
        const uint32_t count = left >= kLanes ? 0xffffu : (1u << left) - 1;
        const Vec value = load_lanes(row + v, int(min(left, kLanes)));
        most = select(less(most, value) & count, value, most);
    }
    float lanes[kLanes];
    store(lanes, most);
    float result = lanes[0];
    for (float lane : lanes) result = lane > result ? lane : result;
    return result;
}

// Of each chunk: the largest logit (at least the lowest finite number, so that a chunk of minus infinities has the sum
// 0), the sum of exp(logit - largest), the target's logit. A chunk's second pass finds it in the cache.
template <typename T>
void chunk_sums(const T* logits, const int64_t* target, int64_t tokens, int64_t vocabulary, int64_t chunk, float* out,
                int threads) {
    const int64_t chunks = vocabulary / chunk;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
        float* largest = out + 3 * n * chunks;
        float *totals = largest + chunks, *picked = totals + chunks;
        for (int64_t c = 0; c < chunks; ++c) {
            const T* row = logits + n * vocabulary + c * chunk;
            largest[c] = largest_of(row, chunk);
            const Vec shift = broadcast(largest[c]);
            Vec total = zero();
            for (int64_t v = 0; v < chunk; v += kLanes) {
                const int64_t left = chunk - v;
                Vec value = exp_nonpositive(sub(load_lanes(row + v, int(min(left, kLanes))), shift));
                if (left < kLanes) value = select((1u << left) - 1, value, zero());
                total = add(total, value);
            }
            totals[c] = sum(total);
            picked[c] = 0;
        }
        if (target[n] >= 0) picked[target[n] / chunk] = to_float(logits[n * vocabulary + target[n]]);
    }
}

// (softmax - one at the target) * gradient; out may be logits. target < 0: the target is not among these logits. Where
// they are soft-capped, inverse_cap is 1 / cap, else 0, and the result times the cap's derivative, 1 - (logit / cap)^2.
template <typename T>
void gradient(const T* logits, const float* normaliser, const float* factor, const int64_t* target, int64_t tokens,
              int64_t vocabulary, float inverse_cap, T* out, int threads) {
    const Vec inverse = broadcast(inverse_cap), one = broadcast(1.0f);
    // a branch, since minus infinity times 0 is no number
    const auto before_cap = [&](Vec gradient, Vec logit) {
        if (inverse_cap == 0) return gradient;
        const Vec share = mul(logit, inverse);
        return mul(gradient, sub(one, mul(share, share)));
    };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
        const T* row = logits + n * vocabulary;
        T* result = out + n * vocabulary;
        const Vec shift = broadcast(normaliser[n]), scale = broadcast(factor[n]);
        const Vec target_logit = target[n] >= 0 ? load(row + target[n], 1) : zero();
        for (int64_t v = 0; v < vocabulary; v += kLanes) {
            const int64_t left = vocabulary - v;
            const Vec logit = load_lanes(row + v, int(min(left, kLanes)));
            const Vec value = mul(exp_nonpositive(sub(logit, shift)), scale);
            store_lanes(result + v, before_cap(value, logit), int(min(left, kLanes)));
        }
        if (target[n] >= 0) {
            float lanes[kLanes];
            const Vec value = sub(mul(exp_nonpositive(sub(target_logit, shift)), scale), scale);
            store(lanes, before_cap(value, target_logit));
            from_float(lanes[0], result + target[n]);
        }
    }
}

}  // namespace
}  // namespace mf

extern "C" {

// logits [tokens, vocabulary], vocabulary = chunk times the chunks, target [tokens] -> out [tokens, 3, chunks].
void mf_loss_sums(const void* logits, int32_t type, const int64_t* target, int64_t tokens, int64_t vocabulary,
                  int64_t chunk, float* out, int32_t threads) {
    mf::with_floats(type, logits, [&](auto* values) {
        mf::chunk_sums(values, target, tokens, vocabulary, chunk, out, threads);
    });
}

// d logits: (exp(logit - normaliser) - [at target]) * factor, factor being the gradient of the token's loss; with
// inverse_cap = 1 / cap that of the logits before the cap.
void mf_loss_gradient(const void* logits, int32_t type, const float* normaliser, const float* factor,
                      const int64_t* target, int64_t tokens, int64_t vocabulary, float inverse_cap, void* out,
                      int32_t threads) {
    mf::with_floats(type, logits, [&](auto* values) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
        mf::gradient(values, normaliser, factor, target, tokens, vocabulary, inverse_cap, static_cast<T*>(out),
                     threads);
    });
}

}  // extern "C"
