// Exact (float32) products with the frozen packed base, and with dense matrices: the interface that dispatch.cpp calls and each
// instruction set implements.
//
// Method. Panels of 48 output columns of the weight are decoded into a buffer that stays in the second-level cache, up to 640
// terms of the sum deep, up to four panels at a time; then 8 rows of x at a time, kept in the first-level cache, are multiplied
// with the panels. The 8 by 48 sums stay in registers. The low-rank branch is more terms of the same sum: its factor's columns
// are appended to the panel and its rows are read after those of x, so it needs no extra pass over the output. The
// weight is decoded once for each share of the rows and never stored. The order of the terms of a sum depends on its length
// alone.
//
// For x W^T (forward) columns of a panel are rows of W and the sum runs over K; for dy W (backward) columns are columns of W and
// the sum runs over N: same product, other decoding.
#pragma once

#include "kernels.h"

namespace lownibble {

constexpr std::int64_t kMatmulPanel = 48, kMatmulRows = 8, kMatmulDepth = 640, kMatmulGroup = 4;

struct MatmulKernels {
    // out (T, N) = x W^T, or (T, K) = x W when `transposed`, plus `addition`; for a range of panels and of rows of x.
    // K is a multiple of 64 and a block has at least 32 elements. `scratch`: matmul_scratch(r) bytes, aligned to 64.
    void (*matmul_4bit)(const float* x, const Weight4bit& w, std::int64_t N, std::int64_t K, bool transposed,
                        const Addition& addition, float* out, void* scratch, Range panels, Range rows);
    // The same with a grouped W without an order; a group is a multiple of 16 long.
    void (*matmul_grouped)(const float* x, const WeightGrouped& w, bool transposed, const Addition& addition, float* out,
                           void* scratch, Range panels, Range rows);
    // The same with a dense W.
    void (*matmul_dense)(const float* x, const float* w, std::int64_t N, std::int64_t K, bool transposed,
                         const Addition& addition, float* out, void* scratch, Range panels, Range rows);
    // out (P, Q) = a^T b, with a (T, P) and b (T, Q), or `adds` more by it; Q is a multiple of 64. Rows are of `out`.
    void (*outer)(const float* a, const float* b, std::int64_t T, std::int64_t P, std::int64_t Q, bool adds, float* out,
                  void* scratch, Range panels, Range rows);
};

// Bytes of a group of panels with r more terms for the low-rank branch.
constexpr std::int64_t matmul_scratch(std::int64_t r) { return kMatmulGroup * (kMatmulDepth + r) * kMatmulPanel * 4; }

extern const MatmulKernels kAvx512MatmulKernels;

}  // namespace lownibble
