// Exact products with the packed base, or a dense matrix, on AVX-512. 24 of the 32 registers hold sums, 8 rows by 48 columns, so
// that 24 multiplications need 11 loads; x is read as it lies, its elements broadcast from memory. Tried and slower where two
// hardware threads share a core: 14 rows by 32 columns, 9 by 48, 6 by 64, 4 by 96, prefetching panels or x (docs/log.md).
#if defined(__x86_64__)

#include "algorithms.h"
#include "lanes_avx512.h"
#include "matmul.h"

namespace lownibble {
namespace {

constexpr std::int64_t kPanel = kMatmulPanel;
constexpr int kVectors = kPanel / 16;

// Bytes [0, 16) of 16 rows -> 16 registers: register j holds byte j of each row.
inline void transpose_bytes(__m128i (&rows)[16]) {
    __m128i other[16];
#pragma GCC unroll 4
    for (int stage = 0; stage < 4; ++stage) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {  // as for floats
            other[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
            other[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) rows[i] = other[i];
    }
}

// Panel for x W^T: terms [k0, k0 + depth) of rows [n0, n0 + 48) of W, a term's 48 values side by side; depth is a multiple of 32.
void decode_rows(const Weight4bit& w, std::int64_t N, std::int64_t K, std::int64_t n0, std::int64_t k0, std::int64_t depth,
                 float* panel) {
    const __m512 values = _mm512_loadu_ps(w.values);
    for (std::int64_t part = 0; part < kVectors; ++part) {
        for (std::int64_t k = 0; k < depth; k += 32) {
            __m128i codes[16];
            alignas(64) float constants[16];
            for (int i = 0; i < 16; ++i) {  // past the end the last row again: never stored
                const std::int64_t index = smaller(n0 + part * 16 + i, N - 1) * K + k0 + k;
                codes[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.codes + index / 2));
                constants[i] = block_constant(w, index >> w.block_shift);
            }
            transpose_bytes(codes);
            const __m512 constant = _mm512_load_ps(constants);
            float* to = panel + k * kPanel + part * 16;
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j, to += 2 * kPanel) {  // vpermps looks at the low four bits only
                const __m512i low = _mm512_cvtepu8_epi32(codes[j]), high = _mm512_srli_epi32(low, 4);
                _mm512_store_ps(to, _mm512_mul_ps(_mm512_permutexvar_ps(high, values), constant));
                _mm512_store_ps(to + kPanel, _mm512_mul_ps(_mm512_permutexvar_ps(low, values), constant));
            }
        }
    }
}

// Panel for x W: terms [n0, n0 + depth), which are rows of W, of columns [k0, k0 + 48).
void decode_columns(const Weight4bit& w, std::int64_t K, std::int64_t k0, std::int64_t n0, std::int64_t depth, float* panel) {
    const __m512 values = _mm512_loadu_ps(w.values);
    for (int part = 0; part < kVectors; ++part) {
        const std::int64_t k = smaller(k0 + part * 16, K - 16);  // past the end the last ones again: never stored
        float* to = panel + part * 16;
        for (std::int64_t n = n0; n < n0 + depth; ++n, to += kPanel) {
            const std::int64_t index = n * K + k;
            const __m512 constant = _mm512_set1_ps(block_constant(w, index >> w.block_shift));
            _mm512_store_ps(to, _mm512_mul_ps(lookup_16(values, w.codes + index / 2), constant));
        }
    }
}

// The same panels of any W whose 16 values in row n from column k on are `load(n, k)`; depth of the first is a multiple of 16.
template <class Load>
void load_rows(const Load& load, std::int64_t N, std::int64_t n0, std::int64_t k0, std::int64_t depth, float* panel) {
    for (int part = 0; part < kVectors; ++part) {
        for (std::int64_t k = 0; k < depth; k += 16) {
            __m512 values[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) values[i] = load(smaller(n0 + part * 16 + i, N - 1), k0 + k);
            transpose_floats(values);
            float* to = panel + k * kPanel + part * 16;
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j) _mm512_store_ps(to + j * kPanel, values[j]);
        }
    }
}

template <class Load>
void load_columns(const Load& load, std::int64_t K, std::int64_t k0, std::int64_t n0, std::int64_t depth, float* panel) {
    for (std::int64_t n = n0; n < n0 + depth; ++n, panel += kPanel) {
        for (int part = 0; part < kVectors; ++part) {
            _mm512_store_ps(panel + part * 16, load(n, smaller(k0 + part * 16, K - 16)));
        }
    }
}

// r more terms: the factor of the low-rank branch, scaled.
void append_factor(const Addition& addition, std::int64_t first, std::int64_t count, float* panel) {
    for (std::int64_t i = 0; i < addition.r; ++i, panel += kPanel) {
        const float* row = addition.factor + i * addition.step + first * addition.stride;
        for (std::int64_t c = 0; c < kPanel; ++c) panel[c] = c < count ? row[c * addition.stride] * addition.scale : 0.0f;
    }
}

// Rows of the left factor: one after another, or side by side, as the rows of a transposed matrix are.
template <int Rows>
struct Apart {
    const float* rows[Rows];

    Apart(const float* x, std::int64_t stride) {
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) rows[i] = x + i * stride;
    }
    float at(int i, std::int64_t k) const { return rows[i][k]; }
};

template <int Rows>
struct SideBySide {
    const float* x;
    std::int64_t stride;

    float at(int i, std::int64_t k) const { return x[k * stride + i]; }
};

template <int Rows, class Left>
inline void add_term(__m512 (&sums)[Rows][kVectors], const Left& left, std::int64_t k, const float* panel) {
    const __m512 columns[kVectors] = {_mm512_load_ps(panel), _mm512_load_ps(panel + 16), _mm512_load_ps(panel + 32)};
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
        const __m512 x = _mm512_set1_ps(left.at(i, k));
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_fmadd_ps(x, columns[v], sums[i][v]);
    }
}

// `count` terms. Meanwhile the lines at `ahead`, where the tile will be stored, are
// fetched: all at once at the end, they would keep the panel's own lines waiting.
template <int Rows, class Left>
inline void add_terms(__m512 (&sums)[Rows][kVectors], const Left& left, std::int64_t count, const float* panel,
                      const float* ahead = nullptr, std::int64_t ahead_stride = 0) {
    std::int64_t k = 0;
    const auto four_terms = [&] {
#pragma GCC unroll 4
        for (int step = 0; step < 4; ++step) add_term<Rows>(sums, left, k + step, panel + step * kPanel);
        k += 4;
        panel += 4 * kPanel;
    };
    if (ahead) {
        for (int line = 0; line < Rows * kVectors && k + 4 <= count; ++line) {
            __builtin_prefetch(ahead + line / kVectors * ahead_stride + line % kVectors * 16, 1);
            four_terms();
        }
    }
    while (k + 4 <= count) four_terms();
    for (; k < count; ++k, panel += kPanel) add_term<Rows>(sums, left, k, panel);
}

// What all tiles of a panel share: `depth` terms of x, then r of low, added to the bias or to what `out` holds: parts of long
// sums are summed apart, which keeps rounding small.
struct Job {
    const float* x;
    const float* low;
    const float* bias;
    std::int64_t x_stride, depth, r, out_stride;
    bool first;
};

template <int Rows, bool Across>
void multiply_tile(const Job& job, std::int64_t t, const float* panel, std::int64_t column, const __mmask16 (&masks)[kVectors],
                   float* out) {
    __m512 sums[Rows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_setzero_ps();
    }
    out += t * job.out_stride + column;
    if constexpr (Across) {
        add_terms<Rows>(sums, SideBySide<Rows>{job.x + t, job.x_stride}, job.depth, panel, out, job.out_stride);
    } else {
        add_terms<Rows>(sums, Apart<Rows>(job.x + t * job.x_stride, job.x_stride), job.depth, panel, out, job.out_stride);
    }
    if (job.r) add_terms<Rows>(sums, Apart<Rows>(job.low + t * job.r, job.r), job.r, panel + job.depth * kPanel);
    const bool adds = !job.first || job.bias;
    const float* before = job.first && job.bias ? job.bias + column : out;
    const std::int64_t stride = job.first ? 0 : job.out_stride;
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
            if (adds) sums[i][v] = _mm512_add_ps(sums[i][v], _mm512_maskz_loadu_ps(masks[v], before + i * stride + v * 16));
            _mm512_mask_storeu_ps(out + i * job.out_stride + v * 16, masks[v], sums[i][v]);
        }
    }
}

using MultiplyTile = void (*)(const Job&, std::int64_t, const float*, std::int64_t, const __mmask16 (&)[kVectors], float*);
template <bool Across>
constexpr MultiplyTile kMultiplyTile[kMatmulRows + 1] = {
    nullptr,
    multiply_tile<1, Across>,
    multiply_tile<2, Across>,
    multiply_tile<3, Across>,
    multiply_tile<4, Across>,
    multiply_tile<5, Across>,
    multiply_tile<6, Across>,
    multiply_tile<7, Across>,
    multiply_tile<8, Across>,
};

// The left factor, (T, terms), or `Across` its transpose, whose rows are x_stride apart; `adds`: to what `out` holds.
// `fill(first, begin, count, panel)` makes the panel of terms [begin, begin + count) of columns [first, first + 48).
template <bool Across, class Fill>
void product(const float* x, std::int64_t x_stride, const Fill& fill, std::int64_t terms, std::int64_t columns, bool adds,
             const Addition& addition, float* out, void* scratch, Range panels, Range rows) {
    const std::int64_t r = addition.r;
    const std::int64_t parts = (terms + kMatmulDepth - 1) / kMatmulDepth, depth = ((terms + parts - 1) / parts + 63) / 64 * 64;
    const std::int64_t panel_size = (depth + r) * kPanel;
    float* const group = static_cast<float*>(scratch);
    for (std::int64_t p0 = panels.begin; p0 < panels.end; p0 += kMatmulGroup) {
        const std::int64_t p1 = smaller(p0 + kMatmulGroup, panels.end);
        for (std::int64_t c = 0; c < terms; c += depth) {
            const std::int64_t count = smaller(depth, terms - c);
            const float* left = x + (Across ? c * x_stride : c);
            const Job job{left, addition.low, addition.bias, x_stride, count, c + count == terms ? r : 0, columns, c == 0 && !adds};
            for (std::int64_t p = p0; p < p1; ++p) {
                float* panel = group + (p - p0) * panel_size;
                const std::int64_t first = p * kPanel;
                fill(first, c, count, panel);
                if (job.r) append_factor(addition, first, smaller(kPanel, columns - first), panel + count * kPanel);
            }
            for (std::int64_t t = rows.begin; t < rows.end; t += kMatmulRows) {
                const MultiplyTile multiply = kMultiplyTile<Across>[smaller(kMatmulRows, rows.end - t)];
                for (std::int64_t p = p0; p < p1; ++p) {
                    const std::uint64_t mask = (std::uint64_t{1} << smaller(kPanel, columns - p * kPanel)) - 1;
                    const __mmask16 masks[kVectors] = {static_cast<__mmask16>(mask), static_cast<__mmask16>(mask >> 16),
                                                       static_cast<__mmask16>(mask >> 32)};
                    multiply(job, t, group + (p - p0) * panel_size, p * kPanel, masks, out);
                }
            }
        }
    }
}

void matmul_4bit(const float* x, const Weight4bit& w, std::int64_t N, std::int64_t K, bool transposed, const Addition& addition,
                 float* out, void* scratch, Range panels, Range rows) {
    const auto fill = [&](std::int64_t first, std::int64_t begin, std::int64_t count, float* panel) {
        transposed ? decode_columns(w, K, first, begin, count, panel) : decode_rows(w, N, K, first, begin, count, panel);
    };
    const std::int64_t terms = transposed ? N : K;
    product<false>(x, terms, fill, terms, transposed ? K : N, false, addition, out, scratch, panels, rows);
}

template <class Load>
void product_of(const float* x, const Load& load, std::int64_t N, std::int64_t K, bool transposed, const Addition& addition,
                float* out, void* scratch, Range panels, Range rows) {
    const auto fill = [&](std::int64_t first, std::int64_t begin, std::int64_t count, float* panel) {
        transposed ? load_columns(load, K, first, begin, count, panel) : load_rows(load, N, first, begin, count, panel);
    };
    const std::int64_t terms = transposed ? N : K;
    product<false>(x, terms, fill, terms, transposed ? K : N, false, addition, out, scratch, panels, rows);
}

void matmul_grouped(const float* x, const WeightGrouped& w, bool transposed, const Addition& addition, float* out, void* scratch,
                    Range panels, Range rows) {
    with_codes<Avx512>(w.coding, [&](auto type) {
        const typename decltype(type)::type codes(w);
        const auto load = [&](std::int64_t n, std::int64_t k) {
            const std::int64_t element = n * w.K + k;
            return codes.decode(codes.factor(element / w.group_size), element);
        };
        product_of(x, load, w.N, w.K, transposed, addition, out, scratch, panels, rows);
    });
}

void matmul_dense(const float* x, const float* w, std::int64_t N, std::int64_t K, bool transposed, const Addition& addition,
                  float* out, void* scratch, Range panels, Range rows) {
    const auto load = [&](std::int64_t n, std::int64_t k) { return _mm512_loadu_ps(w + n * K + k); };
    product_of(x, load, N, K, transposed, addition, out, scratch, panels, rows);
}

void outer(const float* a, const float* b, std::int64_t T, std::int64_t P, std::int64_t Q, bool adds, float* out, void* scratch,
           Range panels, Range rows) {
    const auto load = [&](std::int64_t t, std::int64_t q) { return _mm512_loadu_ps(b + t * Q + q); };
    const auto fill = [&](std::int64_t first, std::int64_t begin, std::int64_t count, float* panel) {
        load_columns(load, Q, first, begin, count, panel);
    };
    product<true>(a, P, fill, T, Q, adds, Addition{}, out, scratch, panels, rows);
}

}  // namespace

const MatmulKernels kAvx512MatmulKernels = {matmul_4bit, matmul_grouped, matmul_dense, outer};

}  // namespace lownibble

#endif
