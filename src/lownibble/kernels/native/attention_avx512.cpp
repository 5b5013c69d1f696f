// Causal attention on AVX-512; attention.h describes the method.
#if defined(__x86_64__)

#include "attention.h"
#include "avx512.h"

namespace lownibble {
namespace {

constexpr int kTileRows = 6;

// c (rows, 16 V) = or += the sum over s of a[row, s] b[s, :], for up to 6 rows; a's element is a[row * a_row + s * a_step].
template <int V, bool Add>
inline void tile(const float* a, std::int64_t a_row, std::int64_t a_step, const float* b, std::int64_t b_row, std::int64_t steps,
                 float* c, std::int64_t c_row, std::int64_t rows) {
    const float* at[kTileRows];
    for (int r = 0; r < kTileRows; ++r) at[r] = a + smaller(r, rows - 1) * a_row;  // past the end the last row again: never stored
    __m512 sums[kTileRows][V];
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = _mm512_setzero_ps();
    }
    for (std::int64_t s = 0; s < steps; ++s) {
        __m512 row[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) row[v] = _mm512_loadu_ps(b + s * b_row + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < kTileRows; ++r) {
            const __m512 value = _mm512_set1_ps(at[r][s * a_step]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[r][v] = _mm512_fmadd_ps(value, row[v], sums[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
        if (r >= rows) break;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            float* const to = c + r * c_row + 16 * v;
            _mm512_storeu_ps(to, Add ? _mm512_add_ps(_mm512_loadu_ps(to), sums[r][v]) : sums[r][v]);
        }
    }
}

// The same for 6 rows by n columns, n a multiple of 16.
template <bool Add>
inline void strip(const float* a, std::int64_t a_row, std::int64_t a_step, const float* b, std::int64_t b_row,
                  std::int64_t steps, float* c, std::int64_t c_row, std::int64_t rows, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + 64 <= n; i += 64) tile<4, Add>(a, a_row, a_step, b + i, b_row, steps, c + i, c_row, rows);
    if (i + 32 <= n) {
        tile<2, Add>(a, a_row, a_step, b + i, b_row, steps, c + i, c_row, rows);
        i += 32;
    }
    if (i < n) tile<1, Add>(a, a_row, a_step, b + i, b_row, steps, c + i, c_row, rows);
}

// e^x to a few units in the last place, for x up to 88: Cephes' polynomial, as in algorithms.h, in fused operations.
inline __m512 exponentials(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // e^-104 is 0; NaN stays
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);  // to nearest
    const __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
    constexpr float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
#pragma GCC unroll 5
    for (const float term : terms) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
    sum = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(sum, r), r, r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, n);
}

// n is a multiple of 16.
inline float product_sum(const float* a, const float* b, std::int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t i = 0; i < n; i += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
    return _mm512_reduce_add_ps(sum);
}

// rows (L, D) -> out (D, padded_keys(L)), zeros past L.
void transpose(HeadRows rows, std::int64_t L, std::int64_t D, float* out) {
    const std::int64_t padded = padded_keys(L);
    for (std::int64_t t = 0; t < padded; t += 16) {
        for (std::int64_t d = 0; d < D; d += 16) {
            __m512 values[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                values[i] = t + i < L ? _mm512_loadu_ps(rows.data + (t + i) * rows.step + d) : _mm512_setzero_ps();
            }
            transpose_floats(values);
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j) _mm512_store_ps(out + (d + j) * padded + t, values[j]);
        }
    }
}

// scores of queries [first, first + rows), each with the keys that any query of its tile sees; row stride `padded`.
void score(const float* q, std::int64_t q_step, const float* transposed, std::int64_t padded, std::int64_t first,
           std::int64_t rows, std::int64_t D, float* scores) {
    for (std::int64_t key = 0; key < first + rows; key += kKeyTile) {
        const std::int64_t unseeing = key > first ? (key - first) / kTileRows * kTileRows : 0;  // their tiles end before the key
        for (std::int64_t row = unseeing; row < rows; row += kTileRows) {
            const std::int64_t some = smaller(kTileRows, rows - row), seen = first + row + some - key;
            strip<false>(q + row * q_step, q_step, 1, transposed + key, padded, D, scores + row * padded + key, padded, some,
                         smaller(kKeyTile, (seen + 15) / 16 * 16));
        }
    }
}

void forward(HeadRows q, HeadRows k, HeadRows v, HeadRows out, float* lse, std::int64_t lse_step, std::int64_t L, std::int64_t D,
             float scaling, float* scratch) {
    const std::int64_t padded = padded_keys(L);
    float *const transposed = scratch, *const scores = scratch + padded * D;
    transpose(k, L, D, transposed);
    for (std::int64_t first = 0; first < L; first += kQueryBlock) {
        const std::int64_t rows = smaller(kQueryBlock, L - first);
        score(q.data + first * q.step, q.step, transposed, padded, first, rows, D, scores);
        float factors[kQueryBlock];
        for (std::int64_t row = 0; row < rows; ++row) {
            float* const s = scores + row * padded;
            const std::int64_t count = first + row + 1;
            const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
            __m512 most = nothing, sum = _mm512_setzero_ps();
            for (std::int64_t i = 0; i < count; i += 16) {
                most = _mm512_max_ps(most, _mm512_mask_loadu_ps(nothing, first_lanes(count - i), s + i));
            }
            const float largest = _mm512_reduce_max_ps(most);
            const __m512 factor = _mm512_set1_ps(scaling), shift = _mm512_set1_ps(scaling * largest);
            std::int64_t i = 0;
            for (; i < count; i += 16) {  // zeros after the row's last key: a tile of rows goes up to its last row's
                const __m512 scaled = _mm512_fmsub_ps(_mm512_loadu_ps(s + i), factor, shift);
                const __m512 value = _mm512_maskz_mov_ps(first_lanes(count - i), exponentials(scaled));
                _mm512_storeu_ps(s + i, value);
                sum = _mm512_add_ps(sum, value);
            }
            if (i < smaller(padded, count + kTileRows)) _mm512_storeu_ps(s + i, _mm512_setzero_ps());
            const float total = _mm512_reduce_add_ps(sum);
            factors[row] = 1.0f / total;
            lse[(first + row) * lse_step] = scaling * largest + __builtin_logf(total);
        }
        for (std::int64_t row = 0; row < rows; row += kTileRows) {
            const std::int64_t some = smaller(kTileRows, rows - row);
            float* const to = out.data + (first + row) * out.step;
            strip<false>(scores + row * padded, padded, 1, v.data, v.step, first + row + some, to, out.step, some, D);
            for (std::int64_t r = 0; r < some; ++r) {
                for (std::int64_t d = 0; d < D; ++d) to[r * out.step + d] *= factors[row + r];
            }
        }
    }
}

void backward(HeadRows dout, HeadRows q, HeadRows k, HeadRows v, HeadRows out, const float* lse, std::int64_t lse_step,
              HeadRows dq, HeadRows dk, HeadRows dv, std::int64_t group, const std::int64_t head_steps[4], std::int64_t L,
              std::int64_t D, float scaling, float* scratch) {
    const std::int64_t padded = padded_keys(L);
    float *const keys = scratch, *const values = keys + padded * D;
    float *const p = values + padded * D, *const ds = p + padded * kQueryBlock;
    transpose(k, L, D, keys);
    transpose(v, L, D, values);
    for (std::int64_t t = 0; t < L; ++t) {
        for (std::int64_t d = 0; d < D; ++d) dk.data[t * dk.step + d] = dv.data[t * dv.step + d] = 0.0f;
    }
    for (std::int64_t head = 0; head < group; ++head) {
        const float *const dout_head = dout.data + head * head_steps[0], *const q_head = q.data + head * head_steps[1];
        const float* const out_head = out.data + head * head_steps[2];
        float* const dq_head = dq.data + head * head_steps[3];
        for (std::int64_t first = 0; first < L; first += kQueryBlock) {
            const std::int64_t rows = smaller(kQueryBlock, L - first), count = first + rows;
            const float *const dout_block = dout_head + first * dout.step, *const q_block = q_head + first * q.step;
            score(q_block, q.step, keys, padded, first, rows, D, p);
            score(dout_block, dout.step, values, padded, first, rows, D, ds);
            for (std::int64_t row = 0; row < rows; ++row) {
                float *const p_row = p + row * padded, *const ds_row = ds + row * padded;
                const float delta = product_sum(dout_block + row * dout.step, out_head + (first + row) * out.step, D);
                const float shift = lse[(first + row) * lse_step + head];
                const std::int64_t seen = first + row + 1;
                const __m512 factor = _mm512_set1_ps(scaling), shifts = _mm512_set1_ps(shift), deltas = _mm512_set1_ps(delta);
                for (std::int64_t i = 0; i < count; i += 16) {  // zeros after the row's last key
                    const __mmask16 inside = first_lanes(seen - i);
                    const __m512 scaled = _mm512_fmsub_ps(_mm512_loadu_ps(p_row + i), factor, shifts);
                    const __m512 value = _mm512_maskz_mov_ps(inside, exponentials(scaled));
                    const __m512 difference = _mm512_sub_ps(_mm512_loadu_ps(ds_row + i), deltas);
                    _mm512_storeu_ps(p_row + i, value);
                    _mm512_storeu_ps(ds_row + i, _mm512_maskz_mul_ps(inside, _mm512_mul_ps(value, difference), factor));
                }
            }
            for (std::int64_t row = 0; row < rows; row += kTileRows) {
                const std::int64_t some = smaller(kTileRows, rows - row);
                strip<false>(ds + row * padded, padded, 1, k.data, k.step, first + row + some, dq_head + (first + row) * dq.step,
                             dq.step, some, D);
            }
            for (std::int64_t key = 0; key < count; key += kTileRows) {
                const std::int64_t some = smaller(kTileRows, count - key);
                const std::int64_t from = key > first ? key - first : 0;  // earlier queries do not see these keys
                strip<true>(p + from * padded + key, 1, padded, dout_block + from * dout.step, dout.step, rows - from,
                            dv.data + key * dv.step, dv.step, some, D);
                strip<true>(ds + from * padded + key, 1, padded, q_block + from * q.step, q.step, rows - from,
                            dk.data + key * dk.step, dk.step, some, D);
            }
        }
    }
}

}  // namespace

const AttentionKernels kAvx512AttentionKernels = {forward, backward};

}  // namespace lownibble

#endif
