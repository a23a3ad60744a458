// What decode.py describes to the decoder: a whole model, and one step of it. Every field is eight bytes wide, in the
// order of the ctypes structures there. "T" is the type of weights and activations, float32 or bfloat16.
#pragma once

#include <cstdint>

namespace mf {

struct NormWeights {
    const void* weight;  // T [features]
    const void* bias;    // T [features]; null for RMSNorm
};

struct LookupWeights {
    const void* tables;   // T [K, 2^tau, O], or int8 with scales
    const float* scales;  // [K, 2^tau]; null for tables of T
    const void* bias;     // T [O]
};

struct BlockWeights {
    NormWeights norm_attention, norm_ffn, norm_inner;
    LookupWeights query, key, value, up, down;
    const void *query_gain, *key_gain;  // T [D], of the norms of each head's queries and keys; both null for none
};

enum Activation : int64_t { kNone = 0, kGelu = 1, kRelu = 2 };

struct ModelWeights {
    const void* embedding;       // T [V, D]
    const BlockWeights* blocks;  // [L]
    NormWeights final_norm;
    const void* head;          // T [V, D], or int8 with scales
    const float* head_scales;  // [V], or null
    int64_t type;              // a FloatType
    int64_t layers, features, heads, tables, bits, inner_bits, rotary, vocabulary;
    int64_t scaled;      // score "scaled_probability"
    int64_t activation;  // an Activation
    double epsilon;      // of the norms
    double rate;         // -2 / temperature of the hash
    double softcap;      // of the logits; 0: none
};

struct DecodeStep {
    const int64_t* tokens;          // [B]
    int64_t batch, past;            // B; positions in the cache before this one
    const float *cosine, *sine;     // [rotary / 2], of this position
    void* const* keys;              // [L] arrays T [B, H, capacity, head], written at `past`
    void* const* values;            // the same
    const int64_t* capacities;      // [L]
    void* logits;                   // T [B, V]
    int64_t threads;
};

}  // namespace mf
