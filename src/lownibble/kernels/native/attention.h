// Causal attention for training, float32: the interface that dispatch.cpp calls and each instruction set implements.
//
// Method. Segments of tokens are concatenated, and each attends only to itself. For 96 queries of a head at a time the
// scores with all keys up to the last query are one product, kept in the second-level cache; keys beyond a block's last query are
// never computed. Backward computes the scores again from the saved log-sum-exp, as flash attention does, and five products
// follow from it. Keys and values are transposed once for a head; every product is a tile of 6 rows by 64 columns whose sums live
// in registers.
//
// torch's CPU kernel takes keys 512 at a time: up to there a causal mask saves it nothing.
#pragma once

#include "kernels.h"

namespace lownibble {

constexpr std::int64_t kQueryBlock = 96, kKeyTile = 64;

// One head of one segment: element [t, d] at data[t * step + d].
struct HeadRows {
    float* data;
    std::int64_t step;
};

// Length of a row of scores for L keys: whole tiles, and a line more, so that rows do not lie a power of two apart, where they
// would share the same few sets of the cache.
static inline std::int64_t padded_keys(std::int64_t L) { return (L + kKeyTile - 1) / kKeyTile * kKeyTile + 16; }

// Floats of working memory for a segment of L tokens.
static inline std::int64_t attention_scratch(std::int64_t L, std::int64_t D, bool backward) {
    const std::int64_t one = padded_keys(L) * (D + kQueryBlock);
    return backward ? 2 * one + L : one;
}

// D is a multiple of 16; `scratch` is attention_scratch() floats, aligned to 64 bytes; lse: stride `lse_step`.
struct AttentionKernels {
    void (*forward)(HeadRows q, HeadRows k, HeadRows v, HeadRows out, float* lse, std::int64_t lse_step, std::int64_t L,
                    std::int64_t D, float scaling, float* scratch);
    // Heads [0, group) of `dout`, `q`, `out` and `dq`, `head_step` floats apart, share k and v. dk and dv are written.
    void (*backward)(HeadRows dout, HeadRows q, HeadRows k, HeadRows v, HeadRows out, const float* lse, std::int64_t lse_step,
                     HeadRows dq, HeadRows dk, HeadRows dv, std::int64_t group, const std::int64_t head_steps[4], std::int64_t L,
                     std::int64_t D, float scaling, float* scratch);
};

extern const AttentionKernels kAvx512AttentionKernels;

}  // namespace lownibble
