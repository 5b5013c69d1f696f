// AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)

#include "algorithms.h"
#include "lanes_avx512.h"

namespace lownibble {
namespace {

// The matrix-vector product for blocks of 64 and more. 64 bytes of codes are 16 words of 8 codes; a shift brings one code of each
// word into the low four bits, which are all that vpermps looks at: two instructions for 16 weights, where unpacking bytes takes
// four. The weights of a lane are then eight apart, so x is put into that order first, and a block's constant multiplies the sum
// over the block.
constexpr std::int64_t kGroup = 128, kSpreadColumns = 4096, kShortColumns = 1536;

// x (T, K) -> spread (T, S): element [8 i + (j ^ 1)] of each group of 128 at [16 j + i]; zeros past K.
void spread_columns(const float* x, std::int64_t T, std::int64_t K, float* spread, std::int64_t S) {
    const __m512i lanes = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    for (std::int64_t t = 0; t < T; ++t) {
        for (std::int64_t k = 0; k < S; k += kGroup) {
            const __mmask16 inside = K - k >= kGroup ? 0xFFFF : 0x00FF;
            for (int j = 0; j < 8; ++j) {
                const __m512 values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, lanes, x + t * K + k + (j ^ 1), 4);
                _mm512_store_ps(spread + t * S + k + 16 * j, values);
            }
        }
    }
}

// block_constant() of `count` blocks from `first` on: where they lie, or decoded into `decoded`.
inline const float* block_constants(const Weight4bit& w, std::int64_t first, std::int64_t count, float* decoded) {
    if (!w.nested_values) return static_cast<const float*>(w.absmax) + first;
    const std::uint8_t* const codes = static_cast<const std::uint8_t*>(w.absmax) + first;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (std::int64_t i = 0; i < count; i += 16) {
        const __mmask16 inside = count - i >= 16 ? 0xFFFF : static_cast<__mmask16>((1 << (count - i)) - 1);
        const __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(inside, codes + i));
        const __m512 value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, index, w.nested_values, 4);
        const std::int64_t nested = (first + i) >> w.nested_shift;  // 16 blocks are in one nested block, or in two
        const std::int64_t next = ((nested + 1) << w.nested_shift) - first - i;
        __m512 absmax = _mm512_set1_ps(w.nested_absmax[nested]);
        if (next < smaller(16, count - i)) {
            const __mmask16 later = _mm512_cmpge_epi32_mask(lanes, _mm512_set1_epi32(static_cast<std::int32_t>(next)));
            absmax = _mm512_mask_mov_ps(absmax, later, _mm512_set1_ps(w.nested_absmax[nested + 1]));
        }
        _mm512_mask_storeu_ps(decoded + i, inside, _mm512_add_ps(_mm512_mul_ps(value, absmax), _mm512_set1_ps(*w.nested_offset)));
    }
    return decoded;
}

template <int R, int T>
inline void dot_spread(const float* spread, std::int64_t S, std::int64_t K, const Weight4bit& w, __m512 table, std::int64_t row,
                       float (&sums)[R][T]) {
    const std::int64_t row_blocks = K >> w.block_shift;
    alignas(64) float decoded[R * kSpreadColumns / 64];
    const float* const constants = block_constants(w, row * row_blocks, R * row_blocks, decoded);
    __m512 totals[R][T];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) totals[r][t] = _mm512_setzero_ps();
    }
    for (std::int64_t k = 0; k < K; k += kGroup) {
        const __mmask16 inside = K - k >= kGroup ? 0xFFFF : 0x00FF;
        __m512i codes[R];
        __m512 parts[R][T];
        for (int r = 0; r < R; ++r) {
            const std::uint8_t* const at = w.codes + ((row + r) * K + k) / 2;
            __builtin_prefetch(at + R * K / 2);
            codes[r] = _mm512_maskz_loadu_epi32(inside, at);
            for (int t = 0; t < T; ++t) parts[r][t] = _mm512_setzero_ps();
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            for (int r = 0; r < R; ++r) {
                const __m512 weights = _mm512_permutexvar_ps(codes[r], table);
                codes[r] = _mm512_srli_epi32(codes[r], 4);
                for (int t = 0; t < T; ++t) {
                    parts[r][t] = _mm512_fmadd_ps(weights, _mm512_load_ps(spread + t * S + k + 16 * j), parts[r][t]);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            const float* const of_group = constants + r * row_blocks + (k >> w.block_shift);
            __m512 constant = _mm512_set1_ps(*of_group);
            if (w.block_shift == 6 && inside == 0xFFFF) {
                constant = _mm512_mask_mov_ps(constant, 0xFF00, _mm512_set1_ps(of_group[1]));
            }
            for (int t = 0; t < T; ++t) totals[r][t] = _mm512_fmadd_ps(parts[r][t], constant, totals[r][t]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) sums[r][t] = _mm512_reduce_add_ps(totals[r][t]);
    }
}

template <int T, class Out>
void gemv_spread(const float* x, std::int64_t K, const Weight4bit& w, Out* out, std::int64_t N, Range rows) {
    constexpr int kRowsAtOnce = T <= 2 ? 4 : T == 4 ? 2 : 1;
    alignas(64) float spread[T * kSpreadColumns];
    const std::int64_t S = (K + kGroup - 1) / kGroup * kGroup;
    spread_columns(x, T, K, spread, S);
    const __m512 table = _mm512_loadu_ps(w.values);
    std::int64_t row = rows.begin;
    for (; row + kRowsAtOnce <= rows.end; row += kRowsAtOnce) {
        float sums[kRowsAtOnce][T];
        dot_spread<kRowsAtOnce, T>(spread, S, K, w, table, row, sums);
        for (int r = 0; r < kRowsAtOnce; ++r) {
            for (int t = 0; t < T; ++t) from_float(out + t * N + row + r, sums[r][t]);
        }
    }
    for (; row < rows.end; ++row) {
        float sums[1][T];
        dot_spread<1, T>(spread, S, K, w, table, row, sums);
        for (int t = 0; t < T; ++t) from_float(out + t * N + row, sums[0][t]);
    }
}

void gemv_avx512(const float* x, std::int64_t T, std::int64_t K, const Weight4bit& w, DType dtype, void* out, std::int64_t N,
                 Range rows) {
    const bool whole_blocks = (K & ((std::int64_t{1} << w.block_shift) - 1)) == 0;
    with_type(dtype, out, [&](auto* typed) {
        if (!whole_blocks || w.block_shift < 6 || K > kSpreadColumns) {
            gemv_4bit<Avx512>(x, T, K, w, typed, N, rows);
            return;
        }
        std::int64_t t = 0;
        const auto advance = [&](auto tile) {
            for (; t + tile.size <= T; t += tile.size) gemv_spread<tile.size>(x + t * K, K, w, typed + t * N, N, rows);
        };
        if (K <= kShortColumns) advance(Tile<8>{});  // eight longer rows of x would not stay in the first-level cache
        advance(Tile<4>{});
        advance(Tile<2>{});
        advance(Tile<1>{});
    });
}

constexpr Kernels avx512() {  // constexpr: dispatch.cpp reads it while other globals are made
    Kernels kernels = kernels_for<Avx512>("avx512");
    kernels.gemv_4bit = gemv_avx512;
    return kernels;
}

}  // namespace

constexpr Kernels kAvx512Kernels = avx512();

}  // namespace lownibble

#endif
