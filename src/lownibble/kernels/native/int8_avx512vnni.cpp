// 8-bit products on AVX-512 VNNI (vpdpbusd: 64 products of a byte by a byte an instruction, summed by fours into 32 bits).
#if defined(__x86_64__)

#include "avx512.h"
#include "int8.h"

namespace lownibble {
namespace {

inline std::int64_t groups_of(std::int64_t columns) { return (columns + kGroup - 1) / kGroup; }
inline std::int64_t parts_of(std::int64_t columns) { return (columns + kPart - 1) / kPart; }

void row_scales(const Weight4bit& w, std::int64_t K, float* scale, Range rows) {
    for (std::int64_t n = rows.begin; n < rows.end; ++n) {
        const std::int64_t first = (n * K) >> w.block_shift, last = (n * K + K - 1) >> w.block_shift;
        float largest = 0.0f;
        for (std::int64_t block = first; block <= last; ++block) {
            const float constant = block_constant(w, block), size = constant < 0 ? -constant : constant;
            largest = size > largest ? size : largest;
        }
        scale[n] = largest / 127.0f;
    }
}

// Columns [c, end) of a row, one part: its codes into `codes` (a row of a tile), its scale and where its sums start.
template <class Values>
void quantize_part(const Values& values, std::int64_t c, std::int64_t end, std::int8_t* codes, float* scale, std::int32_t* start) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    const auto mask_at = [&](std::int64_t at) { return static_cast<__mmask16>((1u << smaller(16, end - at)) - 1); };
    __m512i largest_bits = _mm512_setzero_si512();  // as integers: NaN is larger than infinity, and stays
    for (std::int64_t at = c; at < end; at += 16) {
        const __m512i bits = _mm512_castps_si512(values(at, mask_at(at)));
        largest_bits = _mm512_max_epu32(largest_bits, _mm512_and_si512(bits, magnitude));
    }
    const float largest = float_of(_mm512_reduce_max_epu32(largest_bits));
    const __m512 factor = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    __m512i total = _mm512_setzero_si512();
    for (std::int64_t at = c; at < end; at += 16) {
        const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(values(at, mask_at(at)), factor));
        total = _mm512_add_epi32(total, code);
        alignas(16) std::int32_t four[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(four), _mm512_cvtsepi32_epi8(code));
        const std::int64_t count = smaller(4, groups_of(end - at));
        for (std::int64_t g = 0; g < count; ++g) {
            std::memcpy(codes + (at / kGroup + g) * kRowTile * kGroup, four + g, kGroup);
        }
    }
    *scale = largest / 127.0f;
    *start = -128 * _mm512_reduce_add_epi32(total);
}

void quantize_rows(const float* x, const float* column_scale, const Rows8bit& rows, Range tiles) {
    const std::int64_t C = rows.C, groups = groups_of(C), parts = parts_of(C);
    for (std::int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        for (std::int64_t i = 0; i < kRowTile; ++i) {
            std::int8_t* codes = rows.codes + (tile * groups * kRowTile + i) * kGroup;
            float* scale = rows.scale + tile * parts * kRowTile + i;
            std::int32_t* start = rows.start + tile * parts * kRowTile + i;
            const std::int64_t t = tile * kRowTile + i;
            if (t >= rows.T) {
                for (std::int64_t g = 0; g < groups; ++g) std::memset(codes + g * kRowTile * kGroup, 0, kGroup);
                for (std::int64_t p = 0; p < parts; ++p) scale[p * kRowTile] = 0, start[p * kRowTile] = 0;
                continue;
            }
            const float* row = x + t * C;
            const auto values = [&](std::int64_t c, __mmask16 mask) {
                const __m512 v = _mm512_maskz_loadu_ps(mask, row + c);
                return column_scale ? _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, column_scale + c)) : v;
            };
            for (std::int64_t p = 0; p < parts; ++p) {
                const std::int64_t end = smaller((p + 1) * kPart, C);
                quantize_part(values, p * kPart, end, codes, scale + p * kRowTile, start + p * kRowTile);
            }
        }
    }
}

// The 16 weights that a block's codes stand for, as unsigned bytes: 128 + value * constant / row scale.
inline __m128i byte_table(const Weight4bit& w, __m512 values, std::int64_t block, float inverse_scale) {
    const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(block_constant(w, block) * inverse_scale));
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(128)));
}

inline float inverse(float scale) { return scale > 0 ? 1.0f / scale : 0.0f; }

// A 4-bit weight as a source of unsigned bytes.
struct Source4bit {
    const Weight4bit& w;
    __m512 values;

    explicit Source4bit(const Weight4bit& weight) : w(weight), values(_mm512_loadu_ps(weight.values)) {}

    // Elements [index, index + 64); index is a multiple of 64, all of one row.
    __m512i bytes_64(std::int64_t index, float inverse_scale) const {
        const std::int64_t block = index >> w.block_shift;
        const __m128i first = byte_table(w, values, block, inverse_scale);
        __m512i table = _mm512_broadcast_i32x4(first);
        if (w.block_shift < 6) {  // blocks of 32
            const __m256i second = _mm256_broadcastsi128_si256(byte_table(w, values, block + 1, inverse_scale));
            table = _mm512_inserti64x4(table, second, 1);
        }
        const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.codes + index / 2));
        const __m512i pairs = _mm512_cvtepu8_epi16(packed);
        const __m512i high = _mm512_srli_epi16(pairs, 4);
        const __m512i low = _mm512_and_si512(_mm512_slli_epi16(pairs, 8), _mm512_set1_epi16(0x0F00));
        return _mm512_shuffle_epi8(table, _mm512_or_si512(high, low));
    }

    // Elements [index, index + 32); index is a multiple of 32.
    __m256i bytes_32(std::int64_t index, float inverse_scale) const {
        const __m256i table = _mm256_broadcastsi128_si256(byte_table(w, values, index >> w.block_shift, inverse_scale));
        const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.codes + index / 2)));
        const __m256i high = _mm256_srli_epi16(pairs, 4);
        const __m256i low = _mm256_and_si256(_mm256_slli_epi16(pairs, 8), _mm256_set1_epi16(0x0F00));
        return _mm256_shuffle_epi8(table, _mm256_or_si256(high, low));
    }
};

// A float32 weight as a source of unsigned bytes; what its row's scale is too small for saturates.
struct SourceDense {
    const float* w;

    __m128i bytes_16(std::int64_t index, __m512 inverse_scale) const {
        const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w + index), inverse_scale));
        const __m512i bytes = _mm512_add_epi32(codes, _mm512_set1_epi32(128));
        return _mm512_cvtusepi32_epi8(_mm512_max_epi32(bytes, _mm512_setzero_si512()));
    }

    __m256i bytes_32(std::int64_t index, float inverse_scale) const {
        const __m512 inverse = _mm512_set1_ps(inverse_scale);
        return _mm256_inserti128_si256(_mm256_castsi128_si256(bytes_16(index, inverse)), bytes_16(index + 16, inverse), 1);
    }

    __m512i bytes_64(std::int64_t index, float inverse_scale) const {
        const __m256i left = bytes_32(index, inverse_scale), right = bytes_32(index + 32, inverse_scale);
        return _mm512_inserti64x4(_mm512_castsi256_si512(left), right, 1);
    }
};

template <int Lane>
inline void store_lane(std::uint8_t* to, __m512i v) {
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_extracti32x4_epi32(v, Lane));
}

// Panel for x W^T: 32 rows of W from n0 on; for each group of 4 columns k in `terms`, the 4 bytes of each of the 32 rows.
template <class Source>
void pack_rows(const Source& w, const float* row_scale, std::int64_t N, std::int64_t K, std::int64_t n0, Range terms,
               std::uint8_t* panel) {
    for (std::int64_t quad = 0; quad < kPanel / 4; ++quad) {
        std::int64_t rows[4];
        float inverses[4];
        for (int i = 0; i < 4; ++i) {  // past the end the last row again: never stored
            rows[i] = smaller(n0 + quad * 4 + i, N - 1);
            inverses[i] = inverse(row_scale[rows[i]]);
        }
        for (std::int64_t k = terms.begin; k < terms.end; k += 64) {
            const __m512i a = w.bytes_64(rows[0] * K + k, inverses[0]);
            const __m512i b = w.bytes_64(rows[1] * K + k, inverses[1]);
            const __m512i c = w.bytes_64(rows[2] * K + k, inverses[2]);
            const __m512i d = w.bytes_64(rows[3] * K + k, inverses[3]);
            const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
            const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
            const __m512i groups[4] = {_mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
                                       _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)};
            std::uint8_t* to = panel + (k - terms.begin) / kGroup * (kPanel * kGroup) + quad * 16;
            for (int j = 0; j < 4; ++j) {  // lane l of vector j is group 4 l + j
                store_lane<0>(to + (0 + j) * (kPanel * kGroup), groups[j]);
                store_lane<1>(to + (4 + j) * (kPanel * kGroup), groups[j]);
                store_lane<2>(to + (8 + j) * (kPanel * kGroup), groups[j]);
                store_lane<3>(to + (12 + j) * (kPanel * kGroup), groups[j]);
            }
        }
    }
}

// Panel for x W: 32 columns of W from k0 on; for each group of 4 rows n in `terms`, the 4 bytes of each of the 32 columns.
template <class Source>
void pack_columns(const Source& w, const float* row_scale, std::int64_t N, std::int64_t K, std::int64_t k0, Range terms,
                  std::uint8_t* panel) {
    for (std::int64_t n = terms.begin; n < terms.end; n += kGroup) {
        __m256i rows[4];
        for (int i = 0; i < 4; ++i) {  // past the end anything: the codes of x are zero there
            const std::int64_t row = smaller(n + i, N - 1);
            rows[i] = w.bytes_32(row * K + k0, inverse(row_scale[row]));
        }
        const __m256i ab_low = _mm256_unpacklo_epi8(rows[0], rows[1]), ab_high = _mm256_unpackhi_epi8(rows[0], rows[1]);
        const __m256i cd_low = _mm256_unpacklo_epi8(rows[2], rows[3]), cd_high = _mm256_unpackhi_epi8(rows[2], rows[3]);
        const __m256i columns[4] = {_mm256_unpacklo_epi16(ab_low, cd_low), _mm256_unpackhi_epi16(ab_low, cd_low),
                                    _mm256_unpacklo_epi16(ab_high, cd_high), _mm256_unpackhi_epi16(ab_high, cd_high)};
        std::uint8_t* to = panel + (n - terms.begin) / kGroup * (kPanel * kGroup);
        for (int j = 0; j < 4; ++j) {  // lane l of vector j is columns 16 l + 4 j to 16 l + 4 j + 3
            _mm_store_si128(reinterpret_cast<__m128i*>(to + j * 16), _mm256_castsi256_si128(columns[j]));
            _mm_store_si128(reinterpret_cast<__m128i*>(to + 64 + j * 16), _mm256_extracti128_si256(columns[j], 1));
        }
    }
}

// sums += 64 products of a byte by a byte, in fours. As assembly: GCC 12 copies the result of its intrinsic from register to
// register and to the stack when a loop's sums are used as floats after it, which halves the speed.
inline void add_products(__m512i& sums, __m512i w, __m512i x) { asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x)); }

// One part of 12 rows by 32 columns: its integer sums live in 24 registers, start at `start` (12), and are added, scaled, to sums
// (12, 32).
template <bool First>
void multiply_part(const std::int8_t* codes, const float* scale, const std::int32_t* start, const std::uint8_t* panel,
                   std::int64_t groups, float* sums) {
    __m512i left[kRowTile], right[kRowTile];
#pragma GCC unroll 12
    for (int i = 0; i < kRowTile; ++i) left[i] = right[i] = _mm512_set1_epi32(start[i]);
    const std::uint8_t* const end = panel + groups * kPanel * kGroup;
    do {
        const __m512i w_left = _mm512_load_si512(panel), w_right = _mm512_load_si512(panel + 64);
#pragma GCC unroll 12
        for (int i = 0; i < kRowTile; ++i) {
            std::int32_t four;
            std::memcpy(&four, codes + i * kGroup, sizeof four);
            const __m512i x = _mm512_set1_epi32(four);
            add_products(left[i], w_left, x);
            add_products(right[i], w_right, x);
        }
        codes += kRowTile * kGroup;
        panel += kPanel * kGroup;
    } while (panel != end);
#pragma GCC unroll 12
    for (int i = 0; i < kRowTile; ++i, sums += kPanel) {
        const __m512 s = _mm512_set1_ps(scale[i]), a = _mm512_cvtepi32_ps(left[i]), b = _mm512_cvtepi32_ps(right[i]);
        _mm512_store_ps(sums, First ? _mm512_mul_ps(a, s) : _mm512_fmadd_ps(a, s, _mm512_load_ps(sums)));
        _mm512_store_ps(sums + 16, First ? _mm512_mul_ps(b, s) : _mm512_fmadd_ps(b, s, _mm512_load_ps(sums + 16)));
    }
}

void multiply_tile(const std::int8_t* codes, const float* scale, const std::int32_t* start, const std::uint8_t* panel,
                   std::int64_t groups, bool first, float* sums) {
    constexpr std::int64_t kPartGroups = kPart / kGroup;
    std::int64_t g = 0;
    if (first) {
        multiply_part<true>(codes, scale, start, panel, smaller(kPartGroups, groups), sums);
        g = kPartGroups;
    }
    for (; g < groups; g += kPartGroups) {
        const std::int64_t part = g / kPartGroups * kRowTile;
        multiply_part<false>(codes + g * kRowTile * kGroup, scale + part, start + part, panel + g * kPanel * kGroup,
                             smaller(kPartGroups, groups - g), sums);
    }
}

// A panel's columns: which there are, their scales and bias, and their part of the low-rank factor, (r, 32).
struct Columns {
    __mmask16 masks[2];
    __m512 scale[2], bias[2];
    float* factor;

    void set(const Addition& addition, const float* row_scale, bool transposed, std::int64_t first, std::int64_t count) {
        for (std::int64_t i = 0; i < addition.r; ++i) {
            for (std::int64_t c = 0; c < kPanel; ++c) {
                const float* element = addition.factor + i * addition.step + (first + c) * addition.stride;
                factor[i * kPanel + c] = c < count ? *element * addition.scale : 0.0f;
            }
        }
        const std::uint32_t mask = count < 32 ? (1u << count) - 1 : 0xFFFFFFFFu;
        for (int half = 0; half < 2; ++half) {
            const std::int64_t c = first + half * 16;
            masks[half] = static_cast<__mmask16>(mask >> (16 * half));
            scale[half] = transposed ? _mm512_set1_ps(1.0f) : _mm512_maskz_loadu_ps(masks[half], row_scale + c);
            bias[half] = addition.bias ? _mm512_maskz_loadu_ps(masks[half], addition.bias + c) : _mm512_setzero_ps();
        }
    }

    void store(float* to, __m512 left, __m512 right) const {
        _mm512_mask_storeu_ps(to, masks[0], left);
        _mm512_mask_storeu_ps(to + 16, masks[1], right);
    }
};

// `Rows` rows of a tile: column scales, bias and the low-rank branch, whose rows are `low`, on the sums of 32 columns.
template <int Rows>
inline void finish_rows(const float* sums, const Columns& panel, const float* low, std::int64_t r, float* out, std::int64_t columns) {
    __m512 y[Rows][2];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            y[i][half] = _mm512_fmadd_ps(_mm512_load_ps(sums + i * kPanel + half * 16), panel.scale[half], panel.bias[half]);
        }
    }
    for (std::int64_t j = 0; j < r; ++j) {
        const __m512 left = _mm512_load_ps(panel.factor + j * kPanel), right = _mm512_load_ps(panel.factor + j * kPanel + 16);
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) {
            const __m512 value = _mm512_set1_ps(low[i * r + j]);
            y[i][0] = _mm512_fmadd_ps(value, left, y[i][0]);
            y[i][1] = _mm512_fmadd_ps(value, right, y[i][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) panel.store(out + i * columns, y[i][0], y[i][1]);
}

template <class Source>
void product(const Rows8bit& x, const Source& w, std::int64_t N, std::int64_t K, bool transposed, const float* row_scale,
             const Addition& addition, float* out, void* scratch, Range range) {
    const std::int64_t groups = groups_of(x.C), parts = parts_of(x.C), columns = transposed ? K : N;
    const std::int64_t tiles = (x.T + kRowTile - 1) / kRowTile, n_panels = range.end - range.begin;
    const std::int64_t panel_bytes = smaller(groups * kGroup, kTerms) * kPanel;
    std::uint8_t* const packed = static_cast<std::uint8_t*>(scratch);
    Columns panels[kPanels];
    for (std::int64_t p = 0; p < n_panels; ++p) {
        const std::int64_t first = (range.begin + p) * kPanel;
        panels[p].factor = reinterpret_cast<float*>(packed + n_panels * panel_bytes) + p * addition.r * kPanel;
        panels[p].set(addition, row_scale, transposed, first, smaller(kPanel, columns - first));
    }
    for (std::int64_t begin = 0; begin < x.C; begin += kTerms) {
        const Range terms{begin, smaller(begin + kTerms, x.C)};
        const bool is_first = begin == 0, is_last = terms.end == x.C;
        for (std::int64_t p = 0; p < n_panels; ++p) {
            const std::int64_t first = (range.begin + p) * kPanel;
            if (transposed) {
                pack_columns(w, row_scale, N, K, first, terms, packed + p * panel_bytes);
            } else {
                pack_rows(w, row_scale, N, K, first, terms, packed + p * panel_bytes);
            }
        }
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
            const std::int64_t first_part = (tile * parts + begin / kPart) * kRowTile;
            const std::int64_t t0 = tile * kRowTile, rows = smaller(kRowTile, x.T - t0);
            const std::int8_t* codes = x.codes + (tile * groups + begin / kGroup) * kRowTile * kGroup;
            for (std::int64_t p = 0; p < n_panels; ++p) {
                const Columns& panel = panels[p];
                float* const to = out + t0 * columns + (range.begin + p) * kPanel;  // where sums wait for more terms
                alignas(64) float sums[kRowTile * kPanel];
                for (std::int64_t i = 0; !is_first && i < rows; ++i) {
                    _mm512_store_ps(sums + i * kPanel, _mm512_maskz_loadu_ps(panel.masks[0], to + i * columns));
                    _mm512_store_ps(sums + i * kPanel + 16, _mm512_maskz_loadu_ps(panel.masks[1], to + i * columns + 16));
                }
                multiply_tile(codes, x.scale + first_part, x.start + first_part, packed + p * panel_bytes,
                              groups_of(terms.end - begin), is_first, sums);
                if (!is_last) {
                    for (std::int64_t i = 0; i < rows; ++i) {
                        const float* row = sums + i * kPanel;
                        panel.store(to + i * columns, _mm512_load_ps(row), _mm512_load_ps(row + 16));
                    }
                    continue;
                }
                const float* low = addition.low + t0 * addition.r;
                std::int64_t i = 0;
                for (; i + 6 <= rows; i += 6) {
                    finish_rows<6>(sums + i * kPanel, panel, low + i * addition.r, addition.r, to + i * columns, columns);
                }
                for (; i < rows; ++i) {
                    finish_rows<1>(sums + i * kPanel, panel, low + i * addition.r, addition.r, to + i * columns, columns);
                }
            }
        }
    }
}

void matmul(const Rows8bit& x, const Weight4bit& w, std::int64_t N, std::int64_t K, bool transposed, const float* row_scale,
            const Addition& addition, float* out, void* scratch, Range panels) {
    product(x, Source4bit(w), N, K, transposed, row_scale, addition, out, scratch, panels);
}

void matmul_dense(const Rows8bit& x, const float* w, std::int64_t N, std::int64_t K, bool transposed, const float* row_scale,
                  float* out, void* scratch, Range panels) {
    product(x, SourceDense{w}, N, K, transposed, row_scale, Addition{}, out, scratch, panels);
}

}  // namespace

const Int8Kernels kAvx512VnniInt8Kernels = {row_scales, quantize_rows, matmul, matmul_dense};

}  // namespace lownibble

#endif
