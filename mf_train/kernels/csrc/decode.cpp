// One token of every sequence through the whole model (Eq. 13 of arXiv 2411.12992), in one call: what is read from
// memory is one row of every table and the LM head, and everything else is arranged around those reads. Activations are
// float32 arrays whose values are rounded to the model's type wherever the plain model's tensors are.
//
// A thread owns whole heads from the lookups of q, k and v to the sum after attention, columns in the other lookups,
// and rows of the vocabulary; every sum is taken by one thread in an order of its own, so results do not depend on the
// number of threads.

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cmath>

#include "decode.h"
#include "decode_double.h"
#include "decode_rows.h"
#include "decode_sums.h"
#include "operation.h"

// In wheels: the function that every glibc has, in place of the version of 2.29, which reports errors otherwise.
#if defined(MF_OLD_GLIBC) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
#elif defined(MF_OLD_GLIBC) && defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17");
#endif

namespace mf {
namespace {

constexpr int64_t kMaxTile = 8;  // sequences that share one pass over the LM head
constexpr int kMaxBits = 16;

inline int64_t padded(int64_t count) { return ceil_div(count, kLanes) * kLanes; }

// Values rounded to T.
template <typename T>
inline float rounded(float value) {
    T out;
    from_float(value, &out);
    return to_float(out);
}
template <typename T>
inline Vec rounded(Vec value) {
    if constexpr (std::is_same_v<T, float>) return value;
    alignas(64) T out[kLanes];
    store(out, value);
    return load(out);
}

// Rounded to T as torch's embedding_bag rounds its sums: in bfloat16, ties away from zero.
template <typename T>
inline Vec rounded_sum(Vec value) {
    if constexpr (std::is_same_v<T, float>) return value;
    alignas(64) float values[kLanes];
    alignas(64) uint32_t bits[kLanes];
    store(values, value);
    std::memcpy(bits, values, sizeof(bits));
    for (uint32_t& b : bits) {
        const bool nan = (b & 0x7fffffffu) > 0x7f800000u;
        b = ((nan ? b | 0x400000u : b + 0x8000u)) & 0xffff0000u;
    }
    std::memcpy(values, bits, sizeof(bits));
    return load(values);
}

// Where the shared arrays and a thread's own one begin in the scratch memory. Counts are in floats.
struct Layout {
    int64_t features, inner, x, qkv, m, codes, weights, own, own_size, total;
    Layout(const ModelWeights& model, int64_t batch, int64_t threads) {
        features = padded(model.features);
        inner = padded(model.tables * model.inner_bits);
        x = 0;
        qkv = x + batch * features;
        m = qkv + 3 * batch * features;
        codes = m + batch * inner;
        weights = codes + batch * padded(model.tables);
        own = weights + batch * padded(model.tables);
        // a row's sums, or one head's in float64; and sixteen tables' features
        own_size = max(max(features, inner), 2 * padded(model.features / model.heads)) + 2 * kLanes * kMaxBits;
        total = own + threads * own_size;
    }
};

// A step has six of these a block, some microseconds apart. A thread waits for microseconds and then offers its core
// to others, because where they are scarce the thread that it waits for may need it: OpenMP's barrier keeps the core
// for milliseconds.
class Barrier {
public:
    void wait(int64_t threads) {
        const int64_t round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        constexpr int kSpins = 4096;
        for (int i = 0; round_.load(std::memory_order_acquire) == round; ++i) {
            if (i < kSpins) {
                relax();
            } else {
                sched_yield();
            }
        }
    }

private:
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<int64_t> round_{0};
};

template <typename T>
class Decoder {
public:
    Decoder(const ModelWeights& model, const DecodeStep& step, float* scratch, int64_t thread, int64_t threads,
            Barrier& barrier)
        : model_(model),
          step_(step),
          barrier_(barrier),
          layout_(model, step.batch, threads),
          thread_(thread),
          threads_(threads),
          head_(model.features / model.heads),
          x_(scratch + layout_.x),
          qkv_(scratch + layout_.qkv),
          m_(scratch + layout_.m),
          weights_(scratch + layout_.weights),
          own_(scratch + layout_.own + thread * layout_.own_size),
          codes_(reinterpret_cast<int32_t*>(scratch + layout_.codes)) {}

    void run() {
        const int64_t features = model_.features, inner = model_.tables * model_.inner_bits;
        embed();
        wait();
        for (int64_t layer = 0; layer < model_.layers; ++layer) {
            const BlockWeights& block = model_.blocks[layer];
            hash(x_, layout_.features, features, block.norm_attention, model_.bits);
            wait();
            attend(block, layer);
            wait();
            hash(x_, layout_.features, features, block.norm_ffn, model_.bits);
            wait();
            look_up_columns(block.up, inner, model_.bits, [&](int64_t b, int64_t c, Vec y) {
                store(m_ + b * layout_.inner + c, activated(y));
            });
            wait();
            hash(m_, layout_.inner, inner, block.norm_inner, model_.inner_bits);
            wait();
            look_up_columns(block.down, features, model_.inner_bits,
                            [&](int64_t b, int64_t c, Vec y) { add_to_residual(b, c, y); });
            wait();
        }
        normalise_all();
        wait();
        multiply_head();
    }

private:
    void wait() { barrier_.wait(threads_); }

    static const T* typed(const void* p) { return static_cast<const T*>(p); }

    void embed() {
        const Range columns = share(model_.features, kColumnUnit, thread_, threads_);
        for (int64_t b = 0; b < step_.batch; ++b) {
            const T* row = typed(model_.embedding) + step_.tokens[b] * model_.features;
            for (int64_t c = columns.first; c < columns.last; ++c) x_[b * layout_.features + c] = to_float(row[c]);
        }
    }

    // ---- norms and hashes

    struct Statistics {
        Vec mean, rstd;
    };

    Statistics statistics(const float* x, int64_t features, const NormWeights& norm) {
        const Moments all = moments(x, features, norm.bias != nullptr, own_);
        const float rstd = 1.0f / std::sqrt(all.squares / float(features) + float(model_.epsilon));
        return {broadcast(all.mean), broadcast(rstd)};
    }

    // Columns [first, last) of the norm's output; the last vector's surplus lanes are zero.
    void normalise(const float* x, Range columns, const Statistics& s, const NormWeights& norm, float* y) {
        for (int64_t c = columns.first; c < columns.last; c += kLanes) {
            const int lanes = int(min(kLanes, columns.last - c));
            Vec value = mul(mul(sub(load(x + c, lanes), s.mean), s.rstd), load(typed(norm.weight) + c, lanes));
            if (norm.bias) value = add(value, load(typed(norm.bias) + c, lanes));
            store(y + c - columns.first, rounded<T>(value));
        }
    }

    // Codes and weights of this thread's tables, sixteen at a time.
    void hash(const float* x, int64_t stride, int64_t features, const NormWeights& norm, int64_t tau) {
        const int64_t groups = ceil_div(model_.tables, kLanes);
        const Range mine = share(step_.batch * groups, 1, thread_, threads_);
        float* z = own_ + layout_.own_size - 2 * kLanes * kMaxBits;
        Statistics s;
        int64_t of = -1;
        for (int64_t unit = mine.first; unit < mine.last; ++unit) {
            const int64_t b = unit / groups, k = unit % groups * kLanes;
            if (b != of) s = statistics(x + b * stride, features, norm);
            of = b;
            const Range columns{k * tau, min(features, (k + kLanes) * tau)};
            normalise(x + b * stride, columns, s, norm, z);
            const int64_t place = b * padded(model_.tables) + k;
            hash_chunks(z, int(tau), codes_ + place, weights_ + place);
        }
    }

    // Sixteen tables' codes and weights of z [16, tau] (Eq. 4, 10), weights computed in float64 and rounded to T.
    void hash_chunks(const float* z, int tau, int32_t* codes, float* weights) {
        uint32_t bits[kMaxBits];
        Double8 product[2] = {Double8{} + 1.0, Double8{} + 1.0}, total[2] = {};
        for (int i = 0; i < tau; ++i) {
            const Vec value = gather(z + i, tau);
            bits[i] = nonnegative(value);
            Double8 magnitude[2];
            widen(select(bits[i], value, negate(value)), magnitude[0], magnitude[1]);
            for (int half = 0; half < 2; ++half) {
                total[half] += magnitude[half];
                Double8 decay = magnitude[half] * model_.rate;
                exponential(decay);
                product[half] *= decay + 1.0;
            }
        }
        for (int half = 0; half < 2; ++half) {
            Double8 weight = 1.0 / product[half];
            if (model_.scaled) weight *= total[half];
            for (int j = 0; j < 8; ++j) weights[8 * half + j] = rounded<T>(float(weight[j]));
        }
        for (int j = 0; j < kLanes; ++j) {
            uint32_t code = 0;
            for (int i = 0; i < tau; ++i) code |= ((bits[i] >> j) & 1u) << i;
            codes[j] = int32_t(code);
        }
    }

    // ---- lookups

    template <typename Table>
    TokenReads<Table> reads(const LookupWeights& lookup, int64_t b, int64_t columns, int64_t tau, int64_t first) const {
        const int64_t place = b * padded(model_.tables);
        return {static_cast<const Table*>(lookup.tables) + first, lookup.scales, codes_ + place, weights_ + place,
                model_.tables, int64_t(1) << tau, columns};
    }

    // Calls take(b, set, c, y) with each sixteen columns of y = lookup + bias of each token and set of tables.
    template <typename Table, typename Take>
    void look_up_sets(const LookupWeights* const* sets, int64_t count, int64_t columns, Range mine, int64_t tau,
                      Take take) {
        lookup_items(
            step_.batch * count, mine.size(), own_,
            [&](int64_t item) { return reads<Table>(*sets[item % count], item / count, columns, tau, mine.first); },
            [&](int64_t item, const float* sums) {
                const T* bias = typed(sets[item % count]->bias);
                for (int64_t c = mine.first; c < mine.last; c += kLanes) {
                    const int lanes = int(min(kLanes, mine.last - c));
                    const Vec sum = load(sums + c - mine.first, lanes);
                    const Vec y = std::is_same_v<Table, T> ? rounded_sum<T>(sum) : rounded<T>(sum);
                    take(item / count, item % count, c, rounded<T>(add(y, load(bias + c, lanes))));
                }
            });
    }

    template <typename Take>
    void look_up(const LookupWeights* const* sets, int64_t count, int64_t columns, Range mine, int64_t tau, Take take) {
        if (sets[0]->scales) {
            look_up_sets<int8_t>(sets, count, columns, mine, tau, take);
        } else {
            look_up_sets<T>(sets, count, columns, mine, tau, take);
        }
    }

    template <typename Take>
    void look_up_columns(const LookupWeights& lookup, int64_t columns, int64_t tau, Take take) {
        const LookupWeights* sets[] = {&lookup};
        look_up(sets, 1, columns, share(columns, kColumnUnit, thread_, threads_), tau,
                [&](int64_t b, int64_t, int64_t c, Vec y) { take(b, c, y); });
    }

    Vec activated(Vec y) const {
        if (model_.activation == kNone) return y;
        alignas(64) float values[kLanes];
        store(values, y);
        for (float& value : values) {
            if (model_.activation == kRelu) {
                value = value > 0 ? value : value != value ? value : 0.0f;
            } else {
                value = rounded<T>(value * 0.5f * (1.0f + std::erf(value * float(M_SQRT1_2))));
            }
        }
        return load(values);
    }

    void add_to_residual(int64_t b, int64_t c, Vec y) {
        float* x = x_ + b * layout_.features + c;
        store(x, rounded<T>(add(load(x), y)));
    }

    // ---- attention

    void attend(const BlockWeights& block, int64_t layer) {
        const Range heads = share(model_.heads, 1, thread_, threads_);
        if (heads.size() == 0) return;
        const LookupWeights* sets[] = {&block.query, &block.key, &block.value};
        const int64_t stride = step_.batch * layout_.features;
        look_up(sets, 3, model_.features, {heads.first * head_, heads.last * head_}, model_.bits,
                [&](int64_t b, int64_t set, int64_t c, Vec y) {
                    const int lanes = int(min(kLanes, heads.last * head_ - c));
                    store(qkv_ + set * stride + b * layout_.features + c, y, lanes);
                });
        for (int64_t b = 0; b < step_.batch; ++b) {
            for (int64_t h = heads.first; h < heads.last; ++h) {
                float* q = qkv_ + b * layout_.features + h * head_;
                if (block.query_gain) {
                    normalise_head(q, typed(block.query_gain) + h * head_);
                    normalise_head(q + stride, typed(block.key_gain) + h * head_);
                }
                attend_head(q, q + stride, q + 2 * stride, b, h, layer);
                float* x = x_ + b * layout_.features + h * head_;
                for (int64_t i = 0; i < head_; ++i) x[i] = rounded<T>(x[i] + q[i]);
            }
        }
    }

    // x / sqrt(mean of x^2 + epsilon), rounded as torch's rms_norm rounds it, times the gain.
    void normalise_head(float* x, const T* gain) const {
        double squares = 0;
        for (int64_t i = 0; i < head_; ++i) squares += double(x[i]) * x[i];
        const float rstd = float(1.0 / std::sqrt(squares / double(head_) + model_.epsilon));
        for (int64_t i = 0; i < head_; ++i) x[i] = rounded<T>(rounded<T>(x[i] * rstd) * to_float(gain[i]));
    }

    void rotate(float* x) const {
        const int64_t half = model_.rotary / 2;
        for (int64_t i = 0; i < half; ++i) {
            const float cosine = rounded<T>(step_.cosine[i]), sine = rounded<T>(step_.sine[i]);
            const float first = x[i], second = x[i + half];
            x[i] = rounded<T>(rounded<T>(first * cosine) - rounded<T>(second * sine));
            x[i + half] = rounded<T>(rounded<T>(second * cosine) + rounded<T>(first * sine));
        }
    }

    // Appends k and v of one head to the cache; q becomes attention's output.
    void attend_head(float* q, float* k, const float* v, int64_t b, int64_t h, int64_t layer) {
        const int64_t capacity = step_.capacities[layer], length = step_.past + 1;
        const int64_t begin = (b * model_.heads + h) * capacity * head_;
        T* keys = static_cast<T*>(step_.keys[layer]) + begin;
        T* values = static_cast<T*>(step_.values[layer]) + begin;
        rotate(q);
        rotate(k);
        for (int64_t i = 0; i < head_; ++i) {
            from_float(k[i], keys + step_.past * head_ + i);
            from_float(v[i], values + step_.past * head_ + i);
        }
        // in blocks of positions, with a running maximum
        constexpr int64_t kBlock = 512;
        alignas(64) double shares[kBlock];
        double* sums = reinterpret_cast<double*>(own_);
        for (int64_t i = 0; i < padded(head_); ++i) sums[i] = 0;
        double largest = -INFINITY, total = 0;
        for (int64_t first = 0; first < length; first += kBlock) {
            const int64_t count = min(kBlock, length - first);
            const double before = largest;
            const double most = scores(q, keys + first * head_, count, shares);
            largest = most > before ? most : before;
            if (first) {
                const double shrink = std::exp(before - largest);
                total *= shrink;
                for (int64_t i = 0; i < head_; ++i) sums[i] *= shrink;
            }
            total += exponentials(shares, count, largest);
            add_values(shares, values + first * head_, count, sums);
        }
        for (int64_t i = 0; i < head_; ++i) q[i] = rounded<T>(float(sums[i] / total));
    }

    // Calls f with each sixteen columns of a head: where, and a function that loads them from any row.
    template <typename F>
    void each_columns(F f) const {
        int64_t c = 0;
        for (; c + kLanes <= head_; c += kLanes) f(c, [c](auto* row) { return load(row + c); });
        const int lanes = int(head_ - c);
        if (lanes) f(c, [c, lanes](auto* row) { return load(row + c, lanes); });
    }

    // shares[t] = <q, key t> / sqrt(head); returns the largest.
    double scores(const float* q, const T* keys, int64_t count, double* shares) const {
        const double scale = 1.0 / std::sqrt(double(head_));
        int64_t t = 0;
        auto dot = [&](auto rows_at_once) {
            constexpr int kRows = decltype(rows_at_once)::value;
            for (; t + kRows <= count; t += kRows) {
                Double8 sums[kRows] = {};
                each_columns([&](int64_t, auto load_row) {
                    const Vec part = load_row(q);
                    for (int r = 0; r < kRows; ++r) {
                        Double8 low, high;
                        multiply(part, load_row(keys + (t + r) * head_), low, high);
                        sums[r] += low + high;
                    }
                });
                for (int r = 0; r < kRows; ++r) shares[t + r] = sum(sums[r]) * scale;
            }
        };
        dot(std::integral_constant<int, 4>());
        dot(std::integral_constant<int, 1>());
        double largest = shares[0];
        for (int64_t i = 1; i < count; ++i) largest = shares[i] > largest ? shares[i] : largest;
        return largest;
    }

    // a * b without rounding.
    static void multiply(const Vec& a, const Vec& b, Double8& low, Double8& high) {
        if constexpr (std::is_same_v<T, bf16>) {
            widen(mul(a, b), low, high);  // exact: 8 bits times 8 bits
        } else {
            Double8 other_low, other_high;
            widen(a, low, high);
            widen(b, other_low, other_high);
            low *= other_low;
            high *= other_high;
        }
    }

    // shares[t] = e^(shares[t] - largest); returns their sum.
    static double exponentials(double* shares, int64_t count, double largest) {
        double total = 0;
        for (int64_t t = 0; t < count; t += 8) {
            const int64_t lanes = min(8, count - t);
            Double8 share{};
            std::memcpy(&share, shares + t, size_t(lanes) * sizeof(double));
            share -= largest;
            exponential(share);
            std::memcpy(shares + t, &share, size_t(lanes) * sizeof(double));
            for (int64_t i = 0; i < lanes; ++i) total += share[i];
        }
        return total;
    }

    void add_values(const double* shares, const T* values, int64_t count, double* sums) const {
        each_columns([&](int64_t c, auto load_row) {
            Double8 even[2], odd[2] = {};
            std::memcpy(even, sums + c, sizeof(even));
            auto add = [&](int64_t t, Double8* into) {
                Double8 low, high;
                widen(load_row(values + t * head_), low, high);
                into[0] += low * shares[t];
                into[1] += high * shares[t];
            };
            int64_t t = 0;
            for (; t + 2 <= count; t += 2) {
                add(t, even);
                add(t + 1, odd);
            }
            if (t < count) add(t, even);
            for (int half = 0; half < 2; ++half) even[half] += odd[half];
            std::memcpy(sums + c, even, sizeof(even));
        });
    }

    // ---- head

    // Into the place of q. Cut by tokens, then nothing is left to do for the other threads.
    void normalise_all() {
        const Range mine = share(step_.batch, 1, thread_, threads_);
        for (int64_t b = mine.first; b < mine.last; ++b) {
            const float* x = x_ + b * layout_.features;
            const Statistics s = statistics(x, model_.features, model_.final_norm);
            normalise(x, {0, model_.features}, s, model_.final_norm, qkv_ + b * layout_.features);
        }
    }

    void multiply_head() {
        for (int64_t b = 0; b < step_.batch; b += kMaxTile) {
            if (model_.head_scales) {
                multiply_tile(static_cast<const int8_t*>(model_.head), b);
            } else {
                multiply_tile(typed(model_.head), b);
            }
        }
    }

    template <typename W>
    void multiply_tile(const W* matrix, int64_t b) {
        const Range mine = share(model_.vocabulary, kRowsAtOnce<1>, thread_, threads_);
        const float* x = qkv_ + b * layout_.features;
        T* y = static_cast<T*>(step_.logits) + b * model_.vocabulary;
        auto multiply = [&](auto batch) {
            multiply_rows<batch.value>(matrix, model_.head_scales, mine, model_.features, x, layout_.features, y,
                                       model_.vocabulary);
            if (model_.softcap == 0) return;
            for (int64_t i = 0; i < batch.value; ++i) cap(y + i * model_.vocabulary, mine);
        };
        switch (min(kMaxTile, step_.batch - b)) {
            case 1: return multiply(std::integral_constant<int, 1>());
            case 2: return multiply(std::integral_constant<int, 2>());
            case 3: return multiply(std::integral_constant<int, 3>());
            case 4: return multiply(std::integral_constant<int, 4>());
            case 5: return multiply(std::integral_constant<int, 5>());
            case 6: return multiply(std::integral_constant<int, 6>());
            case 7: return multiply(std::integral_constant<int, 7>());
            default: return multiply(std::integral_constant<int, 8>());
        }
    }

    // The soft cap of a sequence's logits, cap tanh(logit / cap).
    void cap(T* logits, Range mine) const {
        const float softcap = float(model_.softcap);
        for (int64_t v = mine.first; v < mine.last; ++v) {
            from_float(softcap * std::tanh(to_float(logits[v]) / softcap), logits + v);
        }
    }

    const ModelWeights& model_;
    const DecodeStep& step_;
    Barrier& barrier_;
    const Layout layout_;
    const int64_t thread_, threads_, head_;
    float *x_, *qkv_, *m_, *weights_, *own_;
    int32_t* codes_;
};

}  // namespace
}  // namespace mf

// Logits of the next token of every sequence, and keys and values appended to the cache; scratch memory is the call's
// own. Arguments were checked by decode.py, but for the tokens: where one is not in the vocabulary nothing is written.
extern "C" int32_t mf_decode(const mf::ModelWeights* model, const mf::DecodeStep* step) {
    using namespace mf;
    for (int64_t b = 0; b < step->batch; ++b) {
        if (step->tokens[b] < 0 || step->tokens[b] >= model->vocabulary) return kCodeOutOfRange;
    }
    const Buffer<float> scratch(Layout(*model, step->batch, step->threads).total);
    if (!scratch.ok()) return kNoMemory;
    Barrier barrier;
#pragma omp parallel num_threads(int(step->threads))
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        if (model->type == kFloat32) {
            Decoder<float>(*model, *step, scratch.get(), thread, threads, barrier).run();
        } else {
            Decoder<bf16>(*model, *step, scratch.get(), thread, threads, barrier).run();
        }
    }
    return kDone;
}
