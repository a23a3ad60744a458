// Runs the decoder on random sizes, dtypes and threads, several callers at a time on one model, each array exactly as
// large as it must be: AddressSanitizer sees any access outside, ThreadSanitizer any memory that two threads use
// unordered. Every caller has sequences of its own, and must get what it got alone.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "decode.h"

extern "C" int32_t mf_decode(const mf::ModelWeights*, const mf::DecodeStep*);

#ifdef OWN_THREADS
// In the place of GCC's OpenMP, whose barriers ThreadSanitizer cannot see: a team is threads that are joined.
namespace {
thread_local int own_number = 0, own_team = 1;
}
extern "C" {
int omp_get_thread_num() { return own_number; }
int omp_get_num_threads() { return own_team; }
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> team;
    const auto run = [=](int number) {
        own_number = number;
        own_team = int(threads);
        body(data);
        own_number = 0;
        own_team = 1;
    };
    for (unsigned number = 1; number < threads; ++number) team.emplace_back(run, int(number));
    run(0);
    for (std::thread& each : team) each.join();
}
}
#endif

namespace {

using Random = std::mt19937_64;

int64_t between(Random& random, int64_t low, int64_t high) {
    return low + int64_t(random() % uint64_t(high - low + 1));
}

// An array of its exact size on the heap, of small numbers in the type of weights.
struct Array {
    Array(Random& random, int64_t count, int64_t bytes) : size(count * bytes), data(new uint8_t[size_t(size)]) {
        for (int64_t i = 0; i < count; ++i) {
            const float value = float(int64_t(random() % 2001) - 1000) / 1000.0f;
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            const uint8_t byte = uint8_t(random());
            const uint16_t half = uint16_t(bits >> 16);
            std::memcpy(data.get() + i * bytes, bytes == 4 ? (void*)&bits : bytes == 2 ? (void*)&half : (void*)&byte,
                        size_t(bytes));
        }
    }
    bool operator==(const Array& other) const { return !std::memcmp(data.get(), other.data.get(), size_t(size)); }
    const float* floats() const { return reinterpret_cast<const float*>(data.get()); }
    int64_t size;
    std::unique_ptr<uint8_t[]> data;
};

struct Model {
    explicit Model(Random& random) {
        const auto pick = [&](int64_t low, int64_t high) { return between(random, low, high); };
        weights.type = pick(0, 1);
        bytes = weights.type == 0 ? 4 : 2;
        weights.layers = pick(1, 2);
        const bool wide = pick(0, 5) == 0;  // with heads that are wider than a thread's other arrays
        weights.bits = wide ? 1 : pick(1, 6);
        weights.inner_bits = weights.bits + (wide ? 0 : pick(0, 2));
        weights.heads = pick(1, wide ? 1 : 3);
        weights.features = weights.bits * weights.heads * (wide ? 1300 : pick(1, 30));
        weights.tables = weights.features / weights.bits;
        weights.rotary = pick(0, weights.features / weights.heads / 2) * 2;
        weights.vocabulary = pick(1, 70);
        weights.scaled = pick(0, 1);
        weights.activation = pick(0, 2);
        weights.epsilon = 1e-5;
        weights.rate = -2.0;
        weights.softcap = double(pick(0, 1) * 20);
        const bool bias = pick(0, 1);
        int8 = pick(0, 2) == 0;
        const int64_t inner = weights.tables * weights.inner_bits;
        const auto norm = [&](int64_t features) {
            const void* weight = numbers(random, features);
            return mf::NormWeights{weight, bias ? numbers(random, features) : nullptr};
        };
        const auto lookup = [&](int64_t bits, int64_t columns) {
            const int64_t rows = weights.tables << bits;
            const void* tables = matrix(random, rows, columns);
            const float* scales = int8 ? floats(random, rows) : nullptr;
            return mf::LookupWeights{tables, scales, numbers(random, columns)};
        };
        for (int64_t layer = 0; layer < weights.layers; ++layer) {
            mf::BlockWeights block;
            block.norm_attention = norm(weights.features);
            block.norm_ffn = norm(weights.features);
            block.norm_inner = norm(inner);
            block.query = lookup(weights.bits, weights.features);
            block.key = lookup(weights.bits, weights.features);
            block.value = lookup(weights.bits, weights.features);
            block.up = lookup(weights.bits, inner);
            block.down = lookup(weights.inner_bits, weights.features);
            block.query_gain = bias ? numbers(random, weights.features) : nullptr;
            block.key_gain = bias ? numbers(random, weights.features) : nullptr;
            blocks.push_back(block);
        }
        weights.blocks = blocks.data();
        weights.embedding = numbers(random, weights.vocabulary * weights.features);
        weights.final_norm = norm(weights.features);
        weights.head = matrix(random, weights.vocabulary, weights.features);
        weights.head_scales = int8 ? floats(random, weights.vocabulary) : nullptr;
    }

    const void* numbers(Random& random, int64_t count) { return keep(random, count, bytes).data.get(); }
    const float* floats(Random& random, int64_t count) { return keep(random, count, 4).floats(); }
    const void* matrix(Random& random, int64_t rows, int64_t columns) {
        return keep(random, rows * columns, int8 ? 1 : bytes).data.get();
    }
    const Array& keep(Random& random, int64_t count, int64_t size) {
        arrays.push_back(std::make_unique<Array>(random, count, size));
        return *arrays.back();
    }

    mf::ModelWeights weights;
    int64_t bytes;
    bool int8;
    std::vector<mf::BlockWeights> blocks;
    std::vector<std::unique_ptr<Array>> arrays;
};

// Some steps of a batch of random tokens; returns the last step's logits and the caches.
std::vector<std::unique_ptr<Array>> decode(const Model& model, uint64_t seed) {
    Random random(seed);
    const mf::ModelWeights& weights = model.weights;
    const int64_t batch = between(random, 0, 1) ? between(random, 1, 16) : 1;
    const int64_t threads = between(random, 1, 3), steps = between(random, 1, 4);
    // sometimes after more than one block of attention's positions
    const int64_t before = between(random, 0, 3) ? between(random, 0, 5) : between(random, 505, 520);
    std::vector<std::unique_ptr<Array>> results;
    results.push_back(std::make_unique<Array>(random, batch * weights.vocabulary, model.bytes));
    std::vector<void*> keys, values;
    std::vector<int64_t> capacities, tokens;
    for (int64_t layer = 0; layer < weights.layers; ++layer) {
        capacities.push_back(before + steps + between(random, 0, 3));
        for (std::vector<void*>* part : {&keys, &values}) {
            const int64_t count = batch * weights.features * capacities.back();
            results.push_back(std::make_unique<Array>(random, count, model.bytes));
            part->push_back(results.back()->data.get());
        }
    }
    const Array cosine(random, weights.rotary / 2, 4), sine(random, weights.rotary / 2, 4);
    for (int64_t past = before; past < before + steps; ++past) {
        // on the heap and of its exact size, as all that the call reads
        tokens = std::vector<int64_t>();
        for (int64_t b = 0; b < batch; ++b) tokens.push_back(between(random, 0, weights.vocabulary - 1));
        tokens.shrink_to_fit();
        const mf::DecodeStep step{tokens.data(),  batch,         past,
                                  cosine.floats(), sine.floats(), keys.data(),
                                  values.data(),  capacities.data(), results[0]->data.get(),
                                  threads};
        if (mf_decode(&weights, &step)) std::abort();
        tokens[size_t(between(random, 0, batch - 1))] = between(random, 0, 1) ? -1 : weights.vocabulary;
        if (mf_decode(&weights, &step) != 1) std::abort();
    }
    return results;
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t rounds = argc > 1 ? uint64_t(std::atoi(argv[1])) : 20, callers = 4;
    for (uint64_t round = 0; round < rounds; ++round) {
        Random random(round);
        const Model model(random);
        std::vector<std::vector<std::unique_ptr<Array>>> alone(callers), together(callers);
        for (uint64_t each = 0; each < callers; ++each) alone[each] = decode(model, 100 * round + each);
        std::vector<std::thread> threads;
        for (uint64_t each = 0; each < callers; ++each) {
            threads.emplace_back([&, each] { together[each] = decode(model, 100 * round + each); });
        }
        for (std::thread& thread : threads) thread.join();
        for (uint64_t each = 0; each < callers; ++each) {
            for (size_t i = 0; i < alone[each].size(); ++i) {
                if (!(*alone[each][i] == *together[each][i])) std::abort();
            }
        }
    }
    std::puts("done");
}
