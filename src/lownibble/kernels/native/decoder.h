// The decoder layers of a Llama-like model over a few tokens, with a KV cache; the interface that dispatch.cpp calls.
// kernels/decoder.py says what a layer computes.
//
// Why one operation. In token-by-token decoding a layer of a small model is a dozen products of a few tens of microseconds;
// called one at a time, norms, rotary embedding, activation and the interpreter between them take longer than the products. Here
// the layers are one call and one team of threads that synchronises at barriers.
//
// Tokens may belong to different sequences (each names its slot of the cache and its position) and to different adapters
// (segments of tokens, so that the base product is done once for all of them).
#pragma once

#include "kernels.h"
#include "matmul.h"

namespace lownibble {

enum Projection { kQ, kK, kV, kO, kGate, kUp, kDown, kProjections };

// The structures below are mirrored in kernels/cpu/decoder.py.

struct Linear4bit {
    const std::uint8_t* codes;
    const float* values;
    const void* absmax;
    const float* nested_values;
    const float* nested_absmax;
    const float* nested_offset;
    const float* bias;  // (N,) or null
    std::int64_t N, K;
    std::int32_t block_shift, nested_shift;
};

struct DecoderLayer {
    Linear4bit projections[kProjections];  // the last three empty (N, K = 0): attention only
    const float *input_norm, *feed_forward_norm;                    // (hidden,)
    const float *attention_output_norm, *feed_forward_output_norm;  // (hidden,) or null
    const float *q_norm, *k_norm;                                   // (head_dim,) or null
    std::int64_t hidden, heads, key_heads, head_dim;
    std::int64_t window;          // last tokens that are seen, the own one among them; 0: all
    std::int64_t rope;            // which of the angles
    std::int64_t context, row;    // where its keys and values are: in which of the contexts, and which of its layers it is
    float eps, scaling, softcap, residual_scale;  // softcap 0: scores are not capped
    Activation activation;
};

// A low-rank branch of one projection: scale * B A, A being (r, K) and B, given as its transpose, (r, N); without one, A is null.
struct LowRank {
    const void *A, *B_transposed;
    const float* gain;  // (N,) or null: what the base's output without its bias is multiplied by
    std::int64_t r;
    float scale;
    DType dtype;  // of both
};

// Tokens [begin, end) and their adapter: a branch for each projection of each layer.
struct Segment {
    std::int64_t begin, end;
    const LowRank* branches;  // (layers, kProjections)
};

// Keys and values of the layers that keep as many places.
struct Context {
    float *keys, *values;  // (layers, slots, key_heads, capacity, head_dim)
    std::int64_t capacity;
};

struct Tokens {
    float* x;                      // (T, hidden), replaced by the last layer's output
    std::int64_t T;
    const float *cosine, *sine;    // (angles, T, head_dim)
    const Context* contexts;
    std::int64_t n_slots, longest;  // longest: the largest capacity
    const std::int64_t *slots, *places;  // (T,), (contexts, T); a token's keys and values are written before any token attends
    const Segment* segments;
    std::int64_t n_segments;
};

// Floats that a call needs as working memory: norm and attention output, the projections' outputs, the branches' r values, and a
// row of scores a thread.
static inline std::int64_t decoder_workspace(const DecoderLayer& layer, std::int64_t T, std::int64_t largest_r,
                                             std::int64_t longest, std::int64_t threads) {
    const std::int64_t q = layer.heads * layer.head_dim, kv = layer.key_heads * layer.head_dim;
    const std::int64_t inner = layer.projections[kGate].N;
    return T * (layer.hidden + 2 * q + 2 * kv + 2 * inner + kProjections * largest_r) + threads * longest;
}

// One thread's part of the work. `meet` waits for the other threads; `scratch` is matmul_scratch(0) bytes, aligned to 64, or null
// where `matmul` is. `workspace`: decoder_workspace() floats, shared by the threads.
struct Worker {
    const Kernels* kernels;
    const MatmulKernels* matmul;
    void* scratch;
    std::int64_t index, count;
    void (*meet)();
};

// Take the tokens through the layers, which have the same sizes.
void decoder_layers(const DecoderLayer* layers, std::int64_t n_layers, const Tokens& tokens, std::int64_t largest_r,
                    float* workspace, const Worker& worker);

}  // namespace lownibble
