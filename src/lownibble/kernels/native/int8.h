// 8-bit products with the frozen 4-bit base, and with a dense head: the interface that dispatch.cpp calls and each instruction
// set implements.
//
// Method (ops.py states it in formulas). Each row of x is scaled to 8 bits in parts of 64 values, each by its largest. A weight
// row is brought from 4 bits to 8 with one scale a row, through a table of 16 bytes a block, while its panel of 32 output columns
// is packed for the product, 2048 terms of the sum deep; the panel is used for all rows of x, so the weight is decoded once a
// call and never stored. A few panels at a time, where the sum is long, read those rows once for all of them. The 32-bit sums of
// a part are exact; scaled, they are added in float32. Column scales, bias and the low-rank branch (float32) are applied while
// the sums are still in registers or the first cache.
//
// The packed weights are unsigned (128 is added), because the instruction takes unsigned by signed; minus 128 times the sum of a
// part of x is where its sums start. Rows of x are stored in tiles of 12: the four bytes of twelve rows lie side by side for each
// four columns, so that one pointer serves a tile.
//
// For x W^T (forward) columns of a panel are rows of W and the sum runs over K; for dy W (backward) columns are columns of W and
// the sum runs over N: same product, other packing. The row scales then belong to the summed index and are multiplied into dy
// before it is scaled to 8 bits.
#pragma once

#include "kernels.h"

namespace lownibble {

constexpr std::int64_t kRowTile = 12, kPanel = 32, kGroup = 4, kPart = 64, kTerms = 2048, kPanels = 3;

// T rows of C values each, in tiles of 12 rows (the last padded with zeros) and groups of 4 columns (padded with zeros).
struct Rows8bit {
    std::int8_t* codes;    // tiles * groups * 48
    float* scale;          // tiles * parts * 12: a value is code * scale
    std::int32_t* start;   // tiles * parts * 12: where sums with the part start, -128 times the sum of its codes
    std::int64_t T, C;
};

struct Int8Kernels {
    // scale[n] = the largest constant of row n / 127, for rows [begin, end) of w (N, K).
    void (*row_scales)(const Weight4bit& w, std::int64_t K, float* scale, Range rows);
    // x (T, C) times column_scale (C) or null -> rows, for a range of tiles.
    void (*quantize_rows)(const float* x, const float* column_scale, const Rows8bit& rows, Range tiles);
    // out (T, N) = x W^T, or (T, K) = x W when `transposed`; for a range of at most kPanels panels. `scratch`:
    // int8_scratch(C, r) bytes a panel, aligned to 64.
    void (*matmul)(const Rows8bit& x, const Weight4bit& w, std::int64_t N, std::int64_t K, bool transposed,
                   const float* row_scale, const Addition& addition, float* out, void* scratch, Range panels);
    // The same with a float32 weight, whose codes are W / row_scale rounded, and nothing added.
    void (*matmul_dense)(const Rows8bit& x, const float* w, std::int64_t N, std::int64_t K, bool transposed,
                         const float* row_scale, float* out, void* scratch, Range panels);
};

// Bytes of a packed panel, and of its part of the low-rank factor.
static inline std::int64_t int8_scratch(std::int64_t C, std::int64_t r) {
    return kPanel * (smaller((C + kGroup - 1) / kGroup * kGroup, kTerms) + 4 * r);
}

extern const Int8Kernels kAvx512VnniInt8Kernels;

}  // namespace lownibble
