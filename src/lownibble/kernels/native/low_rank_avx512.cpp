// The low-rank branch's products on AVX-512; low_rank.h describes the method.
#if defined(__x86_64__)

#include "avx512.h"
#include "low_rank.h"

namespace lownibble {
namespace {

constexpr int kTileRows = 8, kTileColumns = 16;

// `factor` (C, r) -> for each 16 of the rank a panel (C, 16), `panel` floats after the one before, the last filled up with zeros.
void pack(const Factor& factor, std::int64_t C, std::int64_t r, float* packed, std::int64_t panel) {
    const __m512i lanes = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(factor.stride));
    for (std::int64_t i = 0; i < r; i += kRankLanes) {
        const __mmask16 inside = first_lanes(r - i);
        const __mmask8 inside_low = static_cast<__mmask8>(inside), inside_high = static_cast<__mmask8>(inside >> 8);
        const float* from = factor.data + i * factor.stride;
        float* to = packed + i / kRankLanes * panel;
        for (std::int64_t c = 0; c < C; ++c, from += factor.step, to += kRankLanes) {
            if (factor.stride == 1) {
                _mm512_store_ps(to, _mm512_maskz_loadu_ps(inside, from));
                continue;
            }
            const __m256 zero = _mm256_setzero_ps();
            _mm256_store_ps(to, _mm512_mask_i64gather_ps(zero, inside_low, lanes, from, 4));
            _mm256_store_ps(to + 8, _mm512_mask_i64gather_ps(zero, inside_high, lanes, from + 8 * factor.stride, 4));
        }
    }
}

// out (8, 16) = x (8, C) by packed (C, 16), for `rows` rows; even and odd terms are summed apart, or each sum would wait for
// itself. These products are bound by memory, so the next tile is fetched meanwhile, and 8 rows of another matrix that is read
// after this one, at `beside`: line by line, since the eight rows that are read at once are too many streams for the hardware's
// own prefetching.
void project_tile(const float* x, std::int64_t C, std::int64_t rows, const float* packed, const float* beside,
                  std::int64_t beside_columns, __m512 (&out)[kTileRows]) {
    const float* at[kTileRows];
    for (int i = 0; i < kTileRows; ++i) at[i] = x + smaller(i, rows - 1) * C;  // past the end the last row again: never stored
    __m512 sums[2][kTileRows];
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) sums[0][i] = sums[1][i] = _mm512_setzero_ps();
    std::int64_t c = 0, lines = 0;
    for (; c + 2 <= C; c += 2) {
        for (lines += beside_columns; lines >= C; lines -= C, beside += 16) {
            _mm_prefetch(reinterpret_cast<const char*>(beside), _MM_HINT_T1);
        }
        _mm_prefetch(reinterpret_cast<const char*>(x + kTileRows * (C + c)), _MM_HINT_T0);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
            const __m512 column = _mm512_load_ps(packed + (c + odd) * kRankLanes);
#pragma GCC unroll 8
            for (int i = 0; i < kTileRows; ++i) {
                sums[odd][i] = _mm512_fmadd_ps(_mm512_set1_ps(at[i][c + odd]), column, sums[odd][i]);
            }
        }
    }
    if (c < C) {
        const __m512 column = _mm512_load_ps(packed + c * kRankLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; ++i) sums[0][i] = _mm512_fmadd_ps(_mm512_set1_ps(at[i][c]), column, sums[0][i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) out[i] = _mm512_add_ps(sums[0][i], sums[1][i]);
}

// Rows of scale x F; into panels of kLowRankRows rows too, where they are given.
void project_rows(const float* x, std::int64_t C, const float* packed, std::int64_t r, float scale, float* out, float* panels,
                  std::int64_t rows, const float* beside = nullptr, std::int64_t beside_columns = 0) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (std::int64_t t = 0; t < rows; t += kTileRows) {
        const std::int64_t some = smaller(kTileRows, rows - t);
        for (std::int64_t i = 0; i < r; i += kRankLanes) {
            __m512 tile[kTileRows];
            project_tile(x + t * C, C, some, packed + i * C, beside + t * beside_columns, i ? 0 : beside_columns, tile);
            for (std::int64_t row = 0; row < some; ++row) {
                const __m512 value = _mm512_mul_ps(tile[row], factor);
                _mm512_mask_storeu_ps(out + (t + row) * r + i, first_lanes(r - i), value);
                if (panels) _mm512_store_ps(panels + i * kLowRankRows + (t + row) * kRankLanes, value);
            }
        }
    }
}

// sums (Columns, 16) += x^T low, with x (rows, Columns), its rows C apart, and low (rows, 16).
template <int Columns>
inline void add_outer_tile(const float* x, std::int64_t C, const float* low, std::int64_t rows, float* sums) {
    __m512 values[Columns];
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) values[c] = _mm512_load_ps(sums + c * kRankLanes);
    for (std::int64_t t = 0; t < rows; ++t, x += C, low += kRankLanes) {
        const __m512 row = _mm512_load_ps(low);
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) values[c] = _mm512_fmadd_ps(_mm512_set1_ps(x[c]), row, values[c]);
    }
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) _mm512_store_ps(sums + c * kRankLanes, values[c]);
}

// Panels of sums (C, 16) += x^T low, with x (rows, C) and panels of low.
void add_outer(const float* x, std::int64_t C, const float* low, std::int64_t r, std::int64_t rows, float* sums) {
    for (std::int64_t i = 0; i < r; i += kRankLanes, low += kLowRankRows * kRankLanes, sums += C * kRankLanes) {
        std::int64_t c = 0;
        for (; c + kTileColumns <= C; c += kTileColumns) {
            add_outer_tile<kTileColumns>(x + c, C, low, rows, sums + c * kRankLanes);
        }
        for (; c < C; ++c) add_outer_tile<1>(x + c, C, low, rows, sums + c * kRankLanes);
    }
}

void project(const float* x, std::int64_t C, const Factor& factor, std::int64_t r, float scale, float* out, float* scratch,
             Range rows) {
    pack(factor, C, r, scratch, C * kRankLanes);
    project_rows(x + rows.begin * C, C, scratch, r, scale, out + rows.begin * r, nullptr, rows.end - rows.begin);
}

void backward(const LowRankBackward& b, float* sums, float* scratch, Range rows) {
    const std::int64_t rank = padded_rank(b.r);
    float *const packed = scratch, *const low = packed + b.N * rank, *const dlow = low + kLowRankRows * rank;
    pack(b.b, b.N, b.r, packed, b.N * kRankLanes);
    std::memset(sums, 0, static_cast<std::size_t>(low_rank_sums(b.N, b.K, b.r)) * 4);
    for (std::int64_t t = rows.begin; t < rows.end; t += kLowRankRows) {
        const std::int64_t some = smaller(kLowRankRows, rows.end - t);
        project_rows(b.dy + t * b.N, b.N, packed, b.r, b.scale, b.dlow + t * b.r, dlow, some, b.x + t * b.K, b.K);
        pack(Factor{b.low + t * b.r, b.r, 1}, some, b.r, low, kLowRankRows * kRankLanes);
        add_outer(b.dy + t * b.N, b.N, low, b.r, some, sums);
        add_outer(b.x + t * b.K, b.K, dlow, b.r, some, sums + b.N * rank);
    }
}

// The sum over shares of 16 values at `sums`; shares are `step` floats apart.
inline __m512 over_shares(const float* sums, std::int64_t step, std::int64_t shares) {
    __m512 total = _mm512_load_ps(sums);
    for (std::int64_t share = 1; share < shares; ++share) total = _mm512_add_ps(total, _mm512_load_ps(sums + share * step));
    return total;
}

void sum_shares(const LowRankBackward& b, const float* sums, std::int64_t shares, float* db, float* da, Range n, Range tiles) {
    const std::int64_t step = low_rank_sums(b.N, b.K, b.r);
    const __m512 scale = _mm512_set1_ps(b.scale);
    for (std::int64_t i = 0; i < b.r; i += kRankLanes) {
        const float* const panel = sums + i * b.N;
        for (std::int64_t row = n.begin; row < n.end; ++row) {
            const __m512 value = _mm512_mul_ps(over_shares(panel + row * kRankLanes, step, shares), scale);
            _mm512_mask_storeu_ps(db + row * b.r + i, first_lanes(b.r - i), value);
        }
    }
    const __m512i lanes = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
    for (std::int64_t i = 0; i < b.r; i += kRankLanes) {
        const float* const panel = sums + padded_rank(b.r) * b.N + i * b.K;
        for (std::int64_t k = tiles.begin * kRankLanes; k < smaller(tiles.end * kRankLanes, b.K); k += kRankLanes) {
            alignas(64) float tile[kRankLanes * kRankLanes];
            const std::int64_t count = smaller(kRankLanes, b.K - k);
            for (std::int64_t c = 0; c < count; ++c) {
                _mm512_store_ps(tile + c * kRankLanes, over_shares(panel + (k + c) * kRankLanes, step, shares));
            }
            for (std::int64_t lane = 0; lane < smaller(kRankLanes, b.r - i); ++lane) {
                const __m512 value = _mm512_mask_i32gather_ps(scale, first_lanes(count), lanes, tile + lane, 4);
                _mm512_mask_storeu_ps(da + (i + lane) * b.K + k, first_lanes(count), value);
            }
        }
    }
}

}  // namespace

const LowRankKernels kAvx512LowRankKernels = {project, backward, sum_shares};

}  // namespace lownibble

#endif
