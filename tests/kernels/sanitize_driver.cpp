// Runs every function of training on random and odd sizes, each array exactly as large as it must be, so that
// AddressSanitizer and UndefinedBehaviorSanitizer see any access outside. Results are checked elsewhere.
//
//     sanitize_driver ROUNDS [digests]
//
// With `digests` floats are small numbers, and a digest of what each function wrote is printed: another instruction set
// has to give the same. A NaN's sign and payload are no result: they differ between x86 and Arm.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

extern "C" {
void mf_hash(const void*, int32_t, int64_t, int32_t, float, int32_t, void*, void*, int32_t);
void mf_hash_backward(const void*, const void*, int32_t, int64_t, int32_t, float, int32_t, void*, int32_t);
int32_t mf_lookup(const void*, int32_t, const void*, int32_t, int64_t, int64_t, int64_t, int32_t, const void* const*,
                  const int64_t*, int32_t, void* const*, int32_t);
int32_t mf_lookup_backward(const void* const*, const void*, int32_t, const void*, int32_t, int64_t, int64_t, int64_t,
                           int32_t, const void* const*, const int64_t*, int32_t, int64_t, float*, void* const*,
                           int32_t);
int32_t mf_column_sums(const void*, int32_t, int64_t, int64_t, float*, int32_t);
int32_t mf_lookup_int8(const void*, int32_t, const void*, int32_t, int64_t, int64_t, int64_t, const int8_t*, int64_t,
                       const float*, void*, int32_t);
int32_t mf_count(const void*, int32_t, int64_t, int64_t, int64_t, int64_t, int64_t*, int32_t);
void mf_norm_moments(const void*, int32_t, int64_t, int64_t, int64_t, int32_t, float*, int32_t);
void mf_norm_normalise(const void*, int32_t, const float*, int64_t, const void*, const void*, int32_t, int64_t, int64_t,
                       int64_t, int32_t, float, void*, float*, float*, int32_t);
void mf_norm_gradient_sums(const void*, const void*, int32_t, const float*, const float*, const void*, int32_t,
                           int64_t, int64_t, int64_t, float*, int32_t);
int32_t mf_norm_gradients(const void*, const void*, int32_t, const float*, const float*, const void*, int32_t,
                          const float*, int64_t, int64_t, int64_t, int64_t, int32_t, void*, float*, float*, int32_t);
void mf_loss_sums(const void*, int32_t, const int64_t*, int64_t, int64_t, int64_t, float*, int32_t);
void mf_loss_gradient(const void*, int32_t, const float*, const float*, const int64_t*, int64_t, int64_t, float,
                      void*, int32_t);
}

namespace {

std::mt19937_64 random_bits(1);
bool with_digests = false;
std::map<std::string, uint64_t> digests;

int64_t between(int64_t low, int64_t high) { return low + int64_t(random_bits() % uint64_t(high - low + 1)); }

// An array of its exact size on the heap, 1 byte for none.
struct Array {
    explicit Array(int64_t bytes) : data(static_cast<uint8_t*>(std::malloc(size_t(bytes ? bytes : 1)))) {
        for (int64_t i = 0; i < bytes; ++i) data[i] = uint8_t(random_bits());  // NaN and infinities among the floats
        for (int64_t i = 0; with_digests && i + 2 <= bytes; i += 2) {
            const float value = float(between(-1000, 1000)) / 250.0f;  // in its upper half a bfloat16
            std::memcpy(data + i, reinterpret_cast<const uint8_t*>(&value) + 2, 2);
        }
    }
    ~Array() { std::free(data); }
    Array(const Array&) = delete;
    float* floats() const { return reinterpret_cast<float*>(data); }
    uint8_t* data;
};

int64_t float_bytes(int32_t type) { return type == 0 ? 4 : 2; }

// What `function` wrote: FNV-1a of its bytes. `type`: 0 float32, 1 bfloat16, 2 bytes.
void note(const char* function, const void* p, int64_t count, int32_t type) {
    const int64_t size = type == 0 ? 4 : type == 1 ? 2 : 1;
    uint64_t& digest = digests.emplace(function, 0xcbf29ce484222325u).first->second;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits = 0;
        std::memcpy(&bits, static_cast<const uint8_t*>(p) + i * size, size_t(size));
        const uint32_t infinity = type == 0 ? 0x7f800000u : 0x7f80u;
        if (type < 2 && (bits & (infinity | (infinity - 1))) > infinity) bits = infinity + 1;
        digest = (digest ^ bits) * 0x100000001b3u;
    }
}

void hash_once() {
    const int32_t type = int32_t(between(0, 1)), tau = int32_t(between(1, 16)), threads = int32_t(between(1, 3));
    const int64_t count = between(0, 3000);
    const int64_t code_bytes = tau <= 8 ? 1 : tau <= 15 ? 2 : 4;
    Array x(count * tau * float_bytes(type)), codes(count * code_bytes), weights(count * float_bytes(type));
    Array dx(count * tau * float_bytes(type));
    for (int32_t scaled = 0; scaled < 2; ++scaled) {
        mf_hash(x.data, type, count, tau, 0.7f, scaled, codes.data, weights.data, threads);
        note("hash", codes.data, count * code_bytes, 2);
        note("hash", weights.data, count, type);
        mf_hash_backward(weights.data, x.data, type, count, tau, 0.7f, scaled, dx.data, threads);
        note("hash backward", dx.data, count * tau, type);
    }
}

void put_code(uint8_t* codes, int64_t bytes, int64_t i, int64_t code) {
    for (int64_t b = 0; b < bytes; ++b) codes[i * bytes + b] = uint8_t(uint64_t(code) >> (8 * b));
}

void lookup_once(int32_t code_type, int32_t weight_type, int32_t table_type) {
    const int64_t code_bytes = int64_t(1) << code_type;
    const int64_t rows = int64_t(1) << between(1, code_type == 0 ? 8 : 10);
    const int64_t tokens = between(0, 4) ? between(0, 40) : between(500, 1500), tables = between(1, 9);
    const int64_t chunks = int64_t(1) << between(0, 3);
    const int64_t columns[2] = {(between(1, 300) + chunks - 1) / chunks * chunks, 64 * between(1, 3)};
    const int32_t threads = int32_t(between(1, 3)), sets = int32_t(between(1, 2));
    Array codes(tokens * tables * code_bytes), weights(tokens * tables * float_bytes(weight_type));
    for (int64_t i = 0; i < tokens * tables; ++i) {
        put_code(codes.data, code_bytes, i, between(0, 2) ? between(0, rows - 1) : rows - 1);
    }
    const int64_t size = float_bytes(table_type);
    Array tables0(tables * rows * columns[0] * size), tables1(tables * rows * columns[1] * size);
    Array y0(tokens * columns[0] * size), y1(tokens * columns[1] * size);
    Array d_tables0(tables * rows * columns[0] * size), d_tables1(tables * rows * columns[1] * size);
    Array d_weights(tokens * tables * 4), d_bias(columns[0] * 4);
    const void* table_sets[2] = {tables0.data, tables1.data};
    const void* dys[2] = {y0.data, y1.data};
    void* ys[2] = {y0.data, y1.data};
    void* d_tables[2] = {d_tables0.data, d_tables1.data};
    auto forward = [&] {
        return mf_lookup(codes.data, code_type, weights.data, weight_type, tokens, tables, rows, sets, table_sets,
                         columns, table_type, ys, threads);
    };
    auto backward = [&] {
        return mf_lookup_backward(dys, codes.data, code_type, weights.data, weight_type, tokens, tables, rows, sets,
                                  table_sets, columns, table_type, chunks, d_weights.floats(), d_tables, threads);
    };
    if (mf_column_sums(y0.data, table_type, tokens, columns[0], d_bias.floats(), threads)) std::abort();
    Array int8_tables(tables * rows * columns[0]), scales(tables * rows * 4);
    Array int8_y(tokens * columns[0] * float_bytes(weight_type));
    auto int8 = [&] {
        return mf_lookup_int8(codes.data, code_type, weights.data, weight_type, tokens, tables, rows,
                              reinterpret_cast<const int8_t*>(int8_tables.data), columns[0],
                              reinterpret_cast<const float*>(scales.data), int8_y.data, threads);
    };
    note("column sums", d_bias.data, columns[0], 0);
    if (forward()) std::abort();
    note("lookup", y0.data, tokens * columns[0], table_type);
    note("lookup", y1.data, tokens * columns[1], table_type);
    if (backward() || int8()) std::abort();
    note("lookup backward", d_tables0.data, tables * rows * columns[0], table_type);
    note("lookup backward", d_tables1.data, tables * rows * columns[1], table_type);
    note("lookup backward", d_weights.data, tokens * tables, 0);
    note("lookup of int8", int8_y.data, tokens * columns[0], weight_type);
    if (tokens == 0 || (code_type == 0 && rows == 256)) return;
    // A code past the last row, or a negative one, anywhere: refused, and nothing is read for it.
    put_code(codes.data, code_bytes, between(0, tokens * tables - 1), between(0, 1) ? rows : -1);
    if (forward() != 1 || backward() != 1 || int8() != 1) std::abort();
}

void count_once(int32_t code_type) {
    const int64_t code_bytes = int64_t(1) << code_type;
    const int64_t rows = int64_t(1) << between(1, code_type == 0 ? 8 : 10);
    const int64_t tokens = between(0, 900), tables = between(1, 40), stride = tables + between(0, 5);
    Array codes(tokens * stride * code_bytes);
    for (int64_t i = 0; i < tokens * stride; ++i) put_code(codes.data, code_bytes, i, between(0, rows - 1));
    std::vector<int64_t> counts(size_t(tables * rows), 0);
    const auto run = [&] {
        return mf_count(codes.data, code_type, tokens, stride, tables, rows, counts.data(), int32_t(between(1, 3)));
    };
    if (run()) std::abort();
    note("count", counts.data(), tables * rows * 8, 2);
    if (tokens == 0 || (code_type == 0 && rows == 256)) return;
    put_code(codes.data, code_bytes, between(0, tokens - 1) * stride + between(0, tables - 1),
             between(0, 1) ? rows : -1);
    if (run() != 1) std::abort();
}

void norm_once() {
    const int32_t type = int32_t(between(0, 1)), weight_type = int32_t(between(0, 1));
    const int32_t threads = int32_t(between(1, 3));
    const int64_t tokens = between(0, 200), chunk = between(1, 70), features = chunk << between(0, 3);
    Array x(tokens * features * float_bytes(type)), dy(tokens * features * float_bytes(type));
    Array out(tokens * features * float_bytes(type)), weight(features * float_bytes(weight_type));
    const int64_t ranks = int64_t(1) << between(0, 3);
    Array mean(tokens * 4), rstd(tokens * 4), sums(ranks * tokens * 8), d_weight(features * 4), d_bias(features * 4);
    for (int32_t centred = 0; centred < 2; ++centred) {
        const int64_t size = tokens * features;
        float* gathered = between(0, 2) ? sums.floats() : nullptr;
        mf_norm_moments(x.data, type, tokens, features, chunk, centred, sums.floats(), threads);
        note("norm's moments", sums.data, tokens * 2, 0);
        mf_norm_normalise(x.data, type, gathered, gathered ? ranks : 1, weight.data, centred ? weight.data : nullptr,
                          weight_type, tokens, features, chunk, centred, 1e-5f, out.data, mean.floats(), rstd.floats(),
                          threads);
        note("norm", out.data, size, type);
        note("norm", mean.data, tokens, 0);
        note("norm", rstd.data, tokens, 0);
        mf_norm_gradient_sums(dy.data, x.data, type, mean.floats(), rstd.floats(), weight.data, weight_type, tokens,
                              features, chunk, sums.floats(), threads);
        if (mf_norm_gradients(dy.data, x.data, type, mean.floats(), rstd.floats(), weight.data, weight_type,
                              gathered, gathered ? ranks : 1, tokens, features, chunk, centred, out.data,
                              d_weight.floats(), d_bias.floats(), threads)) {
            std::abort();
        }
        note("norm's gradients", out.data, size, type);
        note("norm's gradients", d_weight.data, features, 0);
        if (centred) note("norm's gradients", d_bias.data, features, 0);
    }
}

void loss_once() {
    const int32_t type = int32_t(between(0, 1)), threads = int32_t(between(1, 3));
    const int64_t tokens = between(0, 60), chunk = between(1, 90), vocabulary = chunk << between(0, 3);
    Array logits(tokens * vocabulary * float_bytes(type)), d_logits(tokens * vocabulary * float_bytes(type));
    Array sums(tokens * 12 * (vocabulary / chunk)), normaliser(tokens * 4), factor(tokens * 4);
    std::vector<int64_t> target;
    for (int64_t n = 0; n < tokens; ++n) target.push_back(between(-1, vocabulary - 1));
    mf_loss_sums(logits.data, type, target.data(), tokens, vocabulary, chunk, sums.floats(), threads);
    note("loss", sums.data, tokens * 3 * (vocabulary / chunk), 0);
    for (void* out : {d_logits.data, logits.data}) {
        mf_loss_gradient(logits.data, type, normaliser.floats(), factor.floats(), target.data(), tokens, vocabulary,
                         out == logits.data ? 0.05f : 0.0f, out, threads);
        note("loss's gradient", out, tokens * vocabulary, type);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
    with_digests = argc > 2;
    for (int round = 0; round < rounds; ++round) {
        hash_once();
        norm_once();
        loss_once();
        for (int32_t code_type = 0; code_type < 4; ++code_type) {
            lookup_once(code_type, round & 1, (round >> 1) & 1);
            count_once(code_type);
        }
    }
    for (const auto& [function, digest] : digests) {
        if (with_digests) std::printf("%s %016llx\n", function.c_str(), static_cast<unsigned long long>(digest));
    }
    std::puts("done");
}
