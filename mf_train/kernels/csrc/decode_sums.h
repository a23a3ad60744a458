// Sums of the norms (mf_train/model/sums.py) in the order in which torch's CPU kernel takes them: with this order, the
// norms of the decoder and of the plain model agree to the last bit. Nothing but that agreement depends on it.
#pragma once

#include "operation.h"

namespace mf {

#if defined(__AVX512F__)
constexpr int kTorchLanes = 16;
#elif defined(__aarch64__)
constexpr int kTorchLanes = 4;
#else
constexpr int kTorchLanes = 8;
#endif
constexpr int kTorchRows = 4;  // vectors that torch sums side by side
constexpr int kTorchLevels = 4;

// A row of `Lanes` x 4 partial sums.
template <int Lanes>
struct PartialSums {
    float lane[kTorchRows * Lanes];
    void add(const float* x) {
        for (int i = 0; i < kTorchRows * Lanes; ++i) lane[i] += x[i];
    }
};

// Sum of n floats by vectors of `Lanes` lanes, four side by side, in blocks that are summed by themselves.
template <int Lanes>
inline float cascade_sum(const float* x, int64_t n) {
    constexpr int kStride = kTorchRows * Lanes;
    const int64_t vectors = n / Lanes, size = vectors / kTorchRows;
    int level_bits = 4;
    while ((int64_t(1) << (level_bits * kTorchLevels)) < size) ++level_bits;
    const int64_t level_step = int64_t(1) << level_bits;
    PartialSums<Lanes> levels[kTorchLevels] = {};
    int64_t i = 0;
    while (i + level_step <= size) {
        for (int64_t j = 0; j < level_step; ++j, ++i) levels[0].add(x + i * kStride);
        for (int j = 1; j < kTorchLevels; ++j) {
            levels[j].add(levels[j - 1].lane);
            levels[j - 1] = {};
            if (i & ((level_step - 1) << (j * level_bits))) break;
        }
    }
    for (; i < size; ++i) levels[0].add(x + i * kStride);
    for (int j = 1; j < kTorchLevels; ++j) levels[0].add(levels[j].lane);
    float* lanes = levels[0].lane;
    for (int64_t v = size * kTorchRows; v < vectors; ++v) {
        for (int l = 0; l < Lanes; ++l) lanes[l] += x[v * Lanes + l];
    }
    for (int row = 1; row < kTorchRows; ++row) {
        for (int l = 0; l < Lanes; ++l) lanes[l] += lanes[row * Lanes + l];
    }
    if (Lanes == 1) return lanes[0];
    float total = 0;
    for (int64_t j = vectors * Lanes; j < n; ++j) total += x[j];
    for (int l = 0; l < Lanes; ++l) total += lanes[l];
    return total;
}

// As torch.sum takes a contiguous row (aten/src/ATen/native/cpu/SumKernel.cpp).
inline float torch_sum(const float* x, int64_t n) {
    return n < kTorchLanes ? cascade_sum<1>(x, n) : cascade_sum<kTorchLanes>(x, n);
}

struct Moments {
    float mean, squares;  // squares: sum of squared deviations from the mean, or from zero where it is taken as zero
};

// As chunk_moments of sums.py: up to 8 equal chunks, then neighbours by pairs. `scratch` holds `features` floats.
inline Moments moments(const float* x, int64_t features, bool centred, float* scratch) {
    constexpr int kMaxChunks = 8;
    int chunks = kMaxChunks;
    while (features % chunks) chunks /= 2;
    const int64_t size = features / chunks;
    Moments parts[kMaxChunks];
    for (int c = 0; c < chunks; ++c) {
        const float* chunk = x + c * size;
        const float mean = centred ? torch_sum(chunk, size) / float(size) : 0.0f;
        for (int64_t i = 0; i < size; ++i) {
            const float deviation = chunk[i] - mean;
            scratch[i] = deviation * deviation;
        }
        parts[c] = {mean, torch_sum(scratch, size)};
    }
    float count = float(size);
    for (; chunks > 1; chunks /= 2, count *= 2) {
        for (int c = 0; c < chunks / 2; ++c) {
            const Moments left = parts[2 * c], right = parts[2 * c + 1];
            const float apart = right.mean - left.mean;
            float squares = left.squares + right.squares;
            if (centred) squares += apart * apart * (count / 2);
            parts[c] = {(left.mean + right.mean) / 2, squares};
        }
    }
    return parts[0];
}

}  // namespace mf
