// Causal attention on AVX-512; attention.h describes the method.
#if defined(__x86_64__)

#include "algorithms.h"
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

// n is a multiple of 16.
inline float product_sum(const float* a, const float* b, std::int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t i = 0; i < n; i += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
    return _mm512_reduce_add_ps(sum);
}

// rows (L, D) -> out (D, padded_keys(L)), zeros past L.
void transpose(HeadRows rows, std::int64_t L, std::int64_t D, float* out) {
    const std::int64_t padded = padded_keys(L);
    const __m512i lanes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32(static_cast<std::int32_t>(rows.step)));
    for (std::int64_t t = 0; t < padded; t += 16) {
        const std::int64_t count = L - t;
        const __mmask16 inside = count >= 16 ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
        for (std::int64_t d = 0; d < D; ++d) {
            const __m512 column = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, lanes, rows.data + t * rows.step + d, 4);
            _mm512_store_ps(out + d * padded + t, column);
        }
    }
}

// scores (rows, keys) of queries [first, first + rows) with the first `keys` keys; keys a multiple of 64, row stride `padded`.
void score(const float* q, std::int64_t q_step, const float* transposed, std::int64_t padded, std::int64_t rows, std::int64_t keys,
           std::int64_t D, float* scores) {
    for (std::int64_t key = 0; key < keys; key += kKeyTile) {
        for (std::int64_t row = 0; row < rows; row += kTileRows) {
            tile<4, false>(q + row * q_step, q_step, 1, transposed + key, padded, D, scores + row * padded + key, padded,
                           rows - row);
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
        score(q.data + first * q.step, q.step, transposed, padded, rows, padded_keys(first + rows), D, scores);
        float factors[kQueryBlock];
        for (std::int64_t row = 0; row < rows; ++row) {
            float* const s = scores + row * padded;
            const std::int64_t count = first + row + 1, end = smaller(padded, (first + rows + 15) / 16 * 16);
            float largest = -__builtin_inff(), total = 0.0f;
            __m512 most = _mm512_set1_ps(largest);
            std::int64_t i = 0;
            for (; i + 16 <= count; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(s + i));
            largest = _mm512_reduce_max_ps(most);
            for (; i < count; ++i) largest = s[i] > largest ? s[i] : largest;
            for (i = 0; i < count; ++i) s[i] = exponential(scaling * (s[i] - largest));
            for (i = count; i < end; ++i) s[i] = 0.0f;  // a tile of rows goes up to its last row's key
            __m512 sum = _mm512_setzero_ps();
            for (i = 0; i < end; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(s + i));
            total = _mm512_reduce_add_ps(sum);
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
            const std::int64_t rows = smaller(kQueryBlock, L - first), count = first + rows, computed = padded_keys(count);
            const float *const dout_block = dout_head + first * dout.step, *const q_block = q_head + first * q.step;
            score(q_block, q.step, keys, padded, rows, computed, D, p);
            score(dout_block, dout.step, values, padded, rows, computed, D, ds);
            for (std::int64_t row = 0; row < rows; ++row) {
                float *const p_row = p + row * padded, *const ds_row = ds + row * padded;
                const float delta = product_sum(dout_block + row * dout.step, out_head + (first + row) * out.step, D);
                const float shift = lse[(first + row) * lse_step + head];
                const std::int64_t seen = first + row + 1;
                for (std::int64_t i = 0; i < seen; ++i) {
                    p_row[i] = exponential(scaling * p_row[i] - shift);
                    ds_row[i] = p_row[i] * (ds_row[i] - delta) * scaling;
                }
                for (std::int64_t i = seen; i < count; ++i) p_row[i] = ds_row[i] = 0.0f;
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
