// The low-rank branch's products in training, float32: the interface that dispatch.cpp calls and each instruction set implements.
//
//     low = x A^T                          (T, r)   forward
//     dlow = scale dy B                    (T, r)   backward, with
//     dB = scale dy^T low, dA = dlow^T x   (N, r), (r, K)
//
// Method. With 16 columns a general matrix product spends its time packing operands and reading the large one again. Here a
// register holds the 16 columns of a rank, each element of the large operand is broadcast from memory into one multiplication,
// and nothing but the factor is packed. Backward takes 64 rows at a time: dlow of them, then their part of dB while dy is in the
// second-level cache, then of dA. Sums over rows are made in shares of the rows, each with memory of its own, and added at the
// end; how many there are depends on T alone, so results do not depend on the number of threads.
#pragma once

#include "kernels.h"

namespace lownibble {

constexpr std::int64_t kRankLanes = 16, kLowRankRows = 64, kLowRankShare = 256, kLowRankShares = 8;

// A matrix (C, r): element (c, i) is data[c * step + i * stride].
struct Factor {
    const float* data;
    std::int64_t step, stride;
};

struct LowRankBackward {
    const float *dy, *x, *low;  // (T, N), (T, K), (T, r)
    Factor b;                   // (N, r)
    std::int64_t N, K, r;
    float scale;
    float* dlow;  // (T, r)
};

static inline std::int64_t padded_rank(std::int64_t r) { return (r + kRankLanes - 1) / kRankLanes * kRankLanes; }

// Shares of the rows in backward.
static inline std::int64_t low_rank_shares(std::int64_t T) {
    return smaller(kLowRankShares, (T + kLowRankShare - 1) / kLowRankShare);
}

// Floats of a share's sums: dB and dA, both with their rank as columns.
static inline std::int64_t low_rank_sums(std::int64_t N, std::int64_t K, std::int64_t r) { return (N + K) * padded_rank(r); }

// Bytes of working memory of a thread, C the columns of the large operand.
static inline std::int64_t low_rank_scratch(std::int64_t C, std::int64_t r) {
    return (C + 2 * kLowRankRows) * padded_rank(r) * 4;
}

struct LowRankKernels {
    // out (T, r) = scale x F, with F (C, r), for the rows of x in `rows`. `scratch`: low_rank_scratch(C, r) bytes.
    void (*project)(const float* x, std::int64_t C, const Factor& factor, std::int64_t r, float scale, float* out, float* scratch,
                    Range rows);
    // dlow of `rows`, and the sums over them. `scratch`: low_rank_scratch(N, r) bytes, aligned to 64 like `sums`.
    void (*backward)(const LowRankBackward&, float* sums, float* scratch, Range rows);
    // dB (N, r) = scale times the shares' sums, and dA (r, K), for a range of n, then of tiles of 16 k.
    // `sums`: share after share.
    void (*sum_shares)(const LowRankBackward&, const float* sums, std::int64_t shares, float* db, float* da, Range n, Range tiles);
};

extern const LowRankKernels kAvx512LowRankKernels;

}  // namespace lownibble
