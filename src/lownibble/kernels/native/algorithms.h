// The operations, written once against a `Simd` type that the including isa_*.cpp defines:
//
//   Simd::Lanes, Simd::Table      16 floats in registers; 16 floats in the form that lookup needs
//   load, store, zero, fill, add, multiply, fma, sum, absolute, maximum, largest, clamp_to_one
//   table, scaled, lookup         a table, a table times a constant, 16 values for 8 bytes of codes
//   Coder, coder, encode          bounds and order in registers; 16 scaled values to 8 bytes of codes
//   kBitLookup, lookup_bits       whether 16 codes of 2 or 3 bits can be looked up directly; and that
//   kStreams, stream, fence       whether there are stores that go around the caches, for float; and these
//   kTile, kRows                  how many rows of x and of w the matrix-vector product takes at once (registers)
//   kColumns                      how many times 16 columns, over all rows, a low-rank product adds to at once (registers)
//
// 16 because a block has at least 16 elements and a power of two of them: a full block is a whole number of groups, and only
// the end of the tensor and the ends of rows need the scalar tail.
#pragma once

#include "kernels.h"

namespace lownibble {
namespace {

constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kLargestBlock = 4096;
constexpr std::int64_t kStreamElements = 1 << 23;
constexpr float kTiny = 1e-38f;  // bitsandbytes' floor for the scale of an all-zero block

inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

inline int code_at(const std::uint8_t* codes, std::int64_t i) { return i & 1 ? codes[i >> 1] & 15 : codes[i >> 1] >> 4; }

// Decode elements [begin, end) of one block into out; begin is a multiple of 16. With `Stream`, out is aligned to 64 bytes.
template <class Simd, bool Stream = false, class Out>
inline void decode_span(const Weight4bit& w, const typename Simd::Table& table, float constant, std::int64_t begin,
                        std::int64_t end, Out* out) {
    const typename Simd::Table scaled = Simd::scaled(table, constant);
    std::int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes, out += kLanes) {
        const typename Simd::Lanes decoded = Simd::lookup(scaled, w.codes + i / 2);
        if constexpr (Stream) {
            Simd::stream(out, decoded);
        } else {
            Simd::store(out, decoded);
        }
    }
    for (; i < end; ++i, ++out) from_float(out, w.values[code_at(w.codes, i)] * constant);
}

template <class Simd, bool Stream, class Out>
void decode_blocks(const Weight4bit& w, Out* out, Range blocks) {
    const typename Simd::Table table = Simd::table(w.values);
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block) {
        const std::int64_t begin = block << w.block_shift, end = smaller((block + 1) << w.block_shift, w.n);
        decode_span<Simd, Stream>(w, table, block_constant(w, block), begin, end, out + begin);
    }
}

// Outputs of 32 MiB and more are written around the caches: an ordinary store first reads the line that it overwrites.
// Measured on one Xeon (Sapphire Rapids, 2 MiB second-level cache) with a matmul reading the output right after, time against
// ordinary stores: 1.2 at 3 MiB, 1.1 at 16 MiB, 0.97 at 32 MiB, 0.82 at 64 MiB for 16 tokens; within 5% for 256 tokens.
// Decoding alone at 64 MiB: 0.43. The price: an output that was just allocated has its zeroed lines in the cache, and costs 1.2
// times as much; hot paths reuse their buffer.
template <class Simd, class Out>
void dequantize_4bit(const Weight4bit& w, Out* out, Range blocks) {
    if constexpr (Simd::kStreams && sizeof(Out) == sizeof(float)) {
        if (w.n >= kStreamElements && reinterpret_cast<std::uintptr_t>(out) % 64 == 0) {
            decode_blocks<Simd, true>(w, out, blocks);
            Simd::fence();
            return;
        }
    }
    decode_blocks<Simd, false>(w, out, blocks);
}

inline int encode_one(const Encoder4bit& encoder, float scaled) {
    int index = 0;
    for (int i = 0; i < 15; ++i) index += scaled > encoder.bounds[i];
    return encoder.order[index];
}

inline float clamped(float value) { return value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value; }
inline float magnitude(float value) { return float_of(bits_of(value) & 0x7FFFFFFF); }

// The short last block: divided by its constant, not multiplied by the reciprocal, and the floor shows in the constant.
template <class In>
void quantize_short_block(const In* x, std::int64_t count, const Encoder4bit& encoder, std::uint8_t* codes, float* absmax) {
    float largest = kTiny;
    for (std::int64_t i = 0; i < count; ++i) {
        const float size = magnitude(to_float(x[i]));
        largest = size > largest ? size : largest;
    }
    *absmax = largest;
    for (std::int64_t i = 0; i < count; i += 2) {
        const int first = encode_one(encoder, clamped(to_float(x[i]) / largest));
        const int second = encode_one(encoder, i + 1 < count ? clamped(to_float(x[i + 1]) / largest) : 0.0f);
        codes[i / 2] = static_cast<std::uint8_t>(first << 4 | second);
    }
}

template <class Simd, class In>
void quantize_4bit(const In* x, std::int64_t n, std::int32_t block_shift, const Encoder4bit& encoder, std::uint8_t* codes,
                   float* absmax, Range blocks) {
    const typename Simd::Coder coder = Simd::coder(encoder);
    const std::int64_t block_size = std::int64_t{1} << block_shift;
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block) {
        const std::int64_t begin = block << block_shift;
        if (begin + block_size > n) {
            quantize_short_block(x + begin, n - begin, encoder, codes + begin / 2, absmax + block);
            continue;
        }
        typename Simd::Lanes sizes = Simd::zero();
        for (std::int64_t i = 0; i < block_size; i += kLanes) {
            sizes = Simd::maximum(sizes, Simd::absolute(Simd::load(x + begin + i)));
        }
        const float largest = Simd::largest(sizes);
        absmax[block] = largest;
        const typename Simd::Lanes reciprocal = Simd::fill(1.0f / (largest < kTiny ? kTiny : largest));
        for (std::int64_t i = begin; i < begin + block_size; i += kLanes) {
            const typename Simd::Lanes scaled = Simd::clamp_to_one(Simd::multiply(Simd::load(x + i), reciprocal));
            Simd::encode(codes + i / 2, scaled, coder);
        }
    }
}

// 8-bit codes are for block constants, one in 64 elements: plain loops, no intrinsics.
inline void quantize_8bit(const float* x, std::int64_t n, std::int32_t block_shift, const std::uint8_t* lookup,
                          std::uint8_t* codes, float* absmax, Range blocks) {
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block) {
        const std::int64_t begin = block << block_shift, end = smaller((block + 1) << block_shift, n);
        float largest = 0.0f;
        for (std::int64_t i = begin; i < end; ++i) {
            const float size = magnitude(x[i]);
            largest = size > largest ? size : largest;
        }
        absmax[block] = largest;
        const float reciprocal = 1.0f / largest;
        for (std::int64_t i = begin; i < end; ++i) {
            const float scaled = clamped(x[i] * reciprocal);  // 0 * infinity is NaN, whose grid point is 0
            const float stretched = (scaled + 1.0f) * 32767.5f;
            codes[i] = lookup[scaled == scaled ? static_cast<std::int32_t>(stretched + 0.5f) : 0];
        }
    }
}

inline void dequantize_8bit(const std::uint8_t* codes, const float* absmax, const float* values, std::int64_t n,
                            std::int32_t block_shift, float* out, Range blocks) {
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block) {
        const std::int64_t begin = block << block_shift, end = smaller((block + 1) << block_shift, n);
        for (std::int64_t i = begin; i < end; ++i) out[i] = values[codes[i]] * absmax[block];
    }
}

// A plain loop, which compilers turn into vector instructions.
inline void dequantize_int8(const std::int8_t* codes, const float* scale, std::int64_t group, std::int64_t n, float* out) {
    for (std::int64_t begin = 0; begin < n; begin += group) {
        const float factor = scale[begin / group];
        for (std::int64_t i = begin; i < begin + group; ++i) out[i] = static_cast<float>(codes[i]) * factor;
    }
}

template <class Simd, class In>
void to_float32(const In* x, std::int64_t n, float* out) {
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) Simd::store(out + i, Simd::load(x + i));
    for (; i < n; ++i) out[i] = to_float(x[i]);
}

// R rows of w by T rows of x when every row starts a block: decode a group, use it T times, never store it. Several rows of w
// at once give FMA independent sums to work on, and halve or quarter the reads of x. Each block prefetches the one below it,
// R rows on: a row of codes is too short for the hardware to notice.
template <class Simd, int R, int T>
inline void dot_whole_blocks(const float* x, std::int64_t K, const Weight4bit& w, const typename Simd::Table& table,
                             std::int64_t row, float (&sums)[R][T]) {
    using Lanes = typename Simd::Lanes;
    Lanes totals[R][T];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) totals[r][t] = Simd::zero();
    }
    const std::int64_t block_size = std::int64_t{1} << w.block_shift, row_bytes = K / 2, row_blocks = K >> w.block_shift;
    const std::uint8_t* codes = w.codes + row * row_bytes;
    for (std::int64_t b = 0; b < row_blocks; ++b) {
        typename Simd::Table scaled[R];
        for (int r = 0; r < R; ++r) {
            scaled[r] = Simd::scaled(table, block_constant(w, (row + r) * row_blocks + b));
            __builtin_prefetch(codes + (r + R) * row_bytes + (b << w.block_shift) / 2);
        }
        for (std::int64_t k = b << w.block_shift, end = k + block_size; k < end; k += kLanes) {
            for (int r = 0; r < R; ++r) {
                const Lanes weights = Simd::lookup(scaled[r], codes + r * row_bytes + k / 2);
                for (int t = 0; t < T; ++t) totals[r][t] = Simd::fma(weights, Simd::load(x + t * K + k), totals[r][t]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) sums[r][t] = Simd::sum(totals[r][t]);
    }
}

// The general case: rows start and end anywhere in a block. Decodes the row's part of each block to the stack.
template <class Simd, int T>
inline void dot_any(const float* x, std::int64_t K, const Weight4bit& w, const typename Simd::Table& table, std::int64_t row,
                    float* sums) {
    typename Simd::Lanes totals[T];
    for (int t = 0; t < T; ++t) totals[t] = Simd::zero();
    float tails[T] = {};
    float decoded[kLargestBlock];
    const std::int64_t row_begin = row * K, row_end = row_begin + K;
    for (std::int64_t i = row_begin; i < row_end;) {
        const std::int64_t block = i >> w.block_shift;
        const std::int64_t end = smaller((block + 1) << w.block_shift, row_end);
        const std::int64_t aligned = i / kLanes * kLanes;
        decode_span<Simd>(w, table, block_constant(w, block), aligned, end, decoded);
        const float* weights = decoded + (i - aligned);
        const float* inputs = x + (i - row_begin);
        const std::int64_t count = end - i, whole = count / kLanes * kLanes;
        for (std::int64_t k = 0; k < whole; k += kLanes) {
            const typename Simd::Lanes group = Simd::load(weights + k);
            for (int t = 0; t < T; ++t) totals[t] = Simd::fma(group, Simd::load(inputs + t * K + k), totals[t]);
        }
        for (int t = 0; t < T; ++t) {
            for (std::int64_t k = whole; k < count; ++k) tails[t] += weights[k] * inputs[t * K + k];
        }
        i = end;
    }
    for (int t = 0; t < T; ++t) sums[t] = Simd::sum(totals[t]) + tails[t];
}

template <class Simd, int T, class Out>
void gemv_rows(const float* x, std::int64_t K, const Weight4bit& w, Out* out, std::int64_t N, Range rows) {
    constexpr int kRows = Simd::kRows;
    const typename Simd::Table table = Simd::table(w.values);
    const bool whole_blocks = (K & ((std::int64_t{1} << w.block_shift) - 1)) == 0;
    std::int64_t row = rows.begin;
    for (; whole_blocks && row + kRows <= rows.end; row += kRows) {
        float sums[kRows][T];
        dot_whole_blocks<Simd, kRows, T>(x, K, w, table, row, sums);
        for (int r = 0; r < kRows; ++r) {
            for (int t = 0; t < T; ++t) from_float(out + t * N + row + r, sums[r][t]);
        }
    }
    for (; row < rows.end; ++row) {
        float sums[1][T];
        if (whole_blocks) {
            dot_whole_blocks<Simd, 1, T>(x, K, w, table, row, sums);
        } else {
            dot_any<Simd, T>(x, K, w, table, row, sums[0]);
        }
        for (int t = 0; t < T; ++t) from_float(out + t * N + row, sums[0][t]);
    }
}

template <int Rows>
struct Tile {
    static constexpr int size = Rows;
};

// Rows of w go in strips that stay in the second-level cache while the tiles of x pass over them.
template <class Simd, class Out>
void gemv_4bit(const float* x, std::int64_t T, std::int64_t K, const Weight4bit& w, Out* out, std::int64_t N, Range rows) {
    constexpr std::int64_t kStripElements = 1 << 19;
    const std::int64_t strip = larger(1, kStripElements / larger(1, K));
    for (std::int64_t begin = rows.begin; begin < rows.end; begin += strip) {
        const Range part{begin, smaller(begin + strip, rows.end)};
        std::int64_t t = 0;
        const auto advance = [&](auto tile) {
            for (; t + tile.size <= T; t += tile.size) gemv_rows<Simd, tile.size>(x + t * K, K, w, out + t * N, N, part);
        };
        if constexpr (Simd::kTile >= 4) advance(Tile<4>{});
        if constexpr (Simd::kTile >= 2) advance(Tile<2>{});
        advance(Tile<1>{});
    }
}

template <class Simd>
float dot(const float* a, const float* b, std::int64_t n) {
    typename Simd::Lanes even = Simd::zero(), odd = Simd::zero();
    std::int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        even = Simd::fma(Simd::load(a + i), Simd::load(b + i), even);
        odd = Simd::fma(Simd::load(a + i + kLanes), Simd::load(b + i + kLanes), odd);
    }
    for (; i + kLanes <= n; i += kLanes) even = Simd::fma(Simd::load(a + i), Simd::load(b + i), even);
    float tail = 0.0f;
    for (; i < n; ++i) tail += a[i] * b[i];
    return Simd::sum(Simd::add(even, odd)) + tail;
}

// R rows of w by T rows of x; see dot_whole_blocks.
template <class Simd, int R, int T, class Weight>
inline void dot_dense(const float* x, std::int64_t K, const Weight* w, float* out, std::int64_t N) {
    typename Simd::Lanes totals[R][T];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) totals[r][t] = Simd::zero();
    }
    std::int64_t k = 0;
    for (; k + kLanes <= K; k += kLanes) {
        for (int r = 0; r < R; ++r) {
            const typename Simd::Lanes weights = Simd::load(w + r * K + k);
            if (k % (2 * kLanes) == 0) __builtin_prefetch(w + (r + R) * K + k);
            for (int t = 0; t < T; ++t) totals[r][t] = Simd::fma(weights, Simd::load(x + t * K + k), totals[r][t]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) {
            float tail = 0.0f;
            for (std::int64_t i = k; i < K; ++i) tail += to_float(w[r * K + i]) * x[t * K + i];
            out[t * N + r] = Simd::sum(totals[r][t]) + tail;
        }
    }
}

template <class Simd, class Weight>
void gemv_dense(const float* x, std::int64_t T, std::int64_t K, const Weight* w, float* out, std::int64_t N, Range rows) {
    constexpr int kRows = Simd::kRows;
    std::int64_t t = 0;
    const auto advance = [&](auto tile) {
        for (; t + tile.size <= T; t += tile.size) {
            std::int64_t row = rows.begin;
            for (; row + kRows <= rows.end; row += kRows) {
                dot_dense<Simd, kRows, tile.size>(x + t * K, K, w + row * K, out + t * N + row, N);
            }
            for (; row < rows.end; ++row) dot_dense<Simd, 1, tile.size>(x + t * K, K, w + row * K, out + t * N + row, N);
        }
    };
    if constexpr (Simd::kTile >= 4) advance(Tile<4>{});
    if constexpr (Simd::kTile >= 2) advance(Tile<2>{});
    advance(Tile<1>{});
}

// T rows of low by B columns of 16 of factor, added to out.
template <class Simd, int T, int B, class Weight>
inline void add_columns(const float* low, std::int64_t stride, std::int64_t r, const Weight* factor, float* out, std::int64_t N) {
    typename Simd::Lanes totals[B][T];
    for (int b = 0; b < B; ++b) {
        for (int t = 0; t < T; ++t) totals[b][t] = Simd::zero();
    }
    for (std::int64_t j = 0; j < r; ++j) {
        for (int b = 0; b < B; ++b) {
            const typename Simd::Lanes weights = Simd::load(factor + j * N + b * kLanes);
            for (int t = 0; t < T; ++t) totals[b][t] = Simd::fma(Simd::fill(low[t * stride + j]), weights, totals[b][t]);
        }
    }
    for (int b = 0; b < B; ++b) {
        for (int t = 0; t < T; ++t) {
            float* const at = out + t * N + b * kLanes;
            Simd::store(at, Simd::add(Simd::load(at), totals[b][t]));
        }
    }
}

template <class Simd, class Weight>
void add_low_rank(const float* low, std::int64_t stride, std::int64_t T, std::int64_t r, const Weight* factor, float* out,
                  std::int64_t N, Range columns) {
    std::int64_t t = 0;
    const auto advance = [&](auto tile) {
        constexpr int kColumns = Simd::kColumns / tile.size;
        for (; t + tile.size <= T; t += tile.size) {
            std::int64_t n = columns.begin;
            for (; n + kColumns * kLanes <= columns.end; n += kColumns * kLanes) {
                add_columns<Simd, tile.size, kColumns>(low + t * stride, stride, r, factor + n, out + t * N + n, N);
            }
            for (; n + kLanes <= columns.end; n += kLanes) {
                add_columns<Simd, tile.size, 1>(low + t * stride, stride, r, factor + n, out + t * N + n, N);
            }
            // Fewer than 16 columns, in lanes all the same: which columns these are depends on the threads, the result must not.
            const std::int64_t rest = columns.end - n;
            for (int i = 0; rest && i < tile.size; ++i) {
                float totals[kLanes] = {}, weights[kLanes] = {};
                for (std::int64_t j = 0; j < r; ++j) {
                    for (std::int64_t c = 0; c < rest; ++c) weights[c] = to_float(factor[j * N + n + c]);
                    const typename Simd::Lanes by = Simd::fill(low[(t + i) * stride + j]);
                    Simd::store(totals, Simd::fma(by, Simd::load(weights), Simd::load(totals)));
                }
                for (std::int64_t c = 0; c < rest; ++c) out[(t + i) * N + n + c] += totals[c];
            }
        }
    };
    if constexpr (Simd::kColumns >= 4) advance(Tile<4>{});
    if constexpr (Simd::kColumns >= 2) advance(Tile<2>{});
    advance(Tile<1>{});
}

template <class Simd>
void rms_norm(const float* x, const float* weight, std::int64_t n, float eps, float* out) {
    const float factor = 1.0f / __builtin_sqrtf(dot<Simd>(x, x, n) / static_cast<float>(n) + eps);
    for (std::int64_t i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * factor);
}

inline void rotate(const float* x, const float* cosine, const float* sine, std::int64_t n, float* out) {
    const std::int64_t half = n / 2;
    for (std::int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        out[i] = a * cosine[i] - b * sine[i];
        out[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

// e^x to about two units in the last place, without a branch so that loops become vectors: 2^n e^r with |r| <= ln(2) / 2. Below
// -87 it is e^-87. NaN stays NaN. Inlined by force: with so many calls GCC does not do it everywhere by itself.
[[gnu::always_inline]] inline float exponential(float x) {
    const float low = x < -87.0f ? -87.0f : x, bounded = low > 88.0f ? 88.0f : low;
    const float shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer is in the low bits
    const float n = shifted - 12582912.0f;
    const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * r + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    sum = sum * r * r + r + 1.0f;
    return sum * float_of((bits_of(shifted) - 0x4B400000u + 127u) << 23);
}

template <class Simd>
float softmax_row(float* x, std::int64_t n, float scale) {
    float largest = -__builtin_inff();
    std::int64_t i = 0;
    if (n >= kLanes) {
        typename Simd::Lanes most = Simd::load(x);
        for (; i + kLanes <= n; i += kLanes) most = Simd::maximum(most, Simd::load(x + i));
        largest = Simd::largest(most);
    }
    for (; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
    for (i = 0; i < n; ++i) x[i] = exponential(x[i] - largest);
    typename Simd::Lanes sums = Simd::zero();
    for (i = 0; i + kLanes <= n; i += kLanes) sums = Simd::add(sums, Simd::load(x + i));
    float total = Simd::sum(sums);
    for (; i < n; ++i) total += x[i];
    const float factor = scale / total;
    for (i = 0; i < n; ++i) x[i] *= factor;
    return largest + __builtin_logf(total);
}

// GELU in tanh's form, by the logistic function: x / 2 (1 + tanh z) = x / (1 + e^-2z), with 2z = sqrt(8 / pi) (x + 0.044715 x^3).
inline void activate_multiply(Activation activation, const float* gate, const float* up, std::int64_t n, float* out) {
    if (activation == Activation::silu) {
        for (std::int64_t i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
        return;
    }
    for (std::int64_t i = 0; i < n; ++i) {
        const float x = gate[i], twice = 1.59576912f * (x + 0.044715f * x * x * x);
        out[i] = x / (1.0f + exponential(-twice)) * up[i];
    }
}

// x := cap * tanh(x / cap), by the logistic function. Not inlined: in the middle of `attend` it would slow down models without.
[[gnu::noinline]] void cap_scores(float* x, std::int64_t n, float cap) {
    for (std::int64_t i = 0; i < n; ++i) x[i] = cap * (2.0f / (1.0f + exponential(-2.0f / cap * x[i])) - 1.0f);
}

template <class Simd>
void attend(const float* q, const float* keys, const float* values, std::int64_t count, std::int64_t n, float scaling,
            float softcap, float* scores, float* out) {
    float largest = -__builtin_inff();
    for (std::int64_t i = 0; i < count; ++i) {
        scores[i] = scaling * dot<Simd>(q, keys + i * n, n);
        largest = scores[i] > largest ? scores[i] : largest;
    }
    if (softcap != 0.0f) {  // tanh rises, so the largest stays the largest
        cap_scores(scores, count, softcap);
        cap_scores(&largest, 1, softcap);
    }
    for (std::int64_t i = 0; i < count; ++i) scores[i] = exponential(scores[i] - largest);
    float total = 0.0f;
    for (std::int64_t i = 0; i < count; ++i) total += scores[i];
    const float factor = 1.0f / total;
    std::int64_t d = 0;
    for (; d + 4 * kLanes <= n; d += 4 * kLanes) {
        typename Simd::Lanes sums[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
        for (std::int64_t i = 0; i < count; ++i) {
            const typename Simd::Lanes weight = Simd::fill(scores[i]);
            for (int j = 0; j < 4; ++j) sums[j] = Simd::fma(weight, Simd::load(values + i * n + d + j * kLanes), sums[j]);
        }
        for (int j = 0; j < 4; ++j) Simd::store(out + d + j * kLanes, Simd::multiply(sums[j], Simd::fill(factor)));
    }
    for (; d < n; ++d) {
        float sum = 0.0f;
        for (std::int64_t i = 0; i < count; ++i) sum += scores[i] * values[i * n + d];
        out[d] = sum * factor;
    }
}

}  // namespace
}  // namespace lownibble

#include "grouped.h"

namespace lownibble {
namespace {

// Call body with `data` as a pointer to its own type.
template <class Body>
inline void with_type(DType dtype, const void* data, Body body) {
    switch (dtype) {
        case DType::float32: return body(static_cast<const float*>(data));
        case DType::bfloat16: return body(static_cast<const BFloat16*>(data));
        case DType::float16: return body(static_cast<const Float16*>(data));
    }
}

template <class Body>
inline void with_type(DType dtype, void* data, Body body) {
    switch (dtype) {
        case DType::float32: return body(static_cast<float*>(data));
        case DType::bfloat16: return body(static_cast<BFloat16*>(data));
        case DType::float16: return body(static_cast<Float16*>(data));
    }
}

template <class Simd>
constexpr Kernels kernels_for(const char* name) {
    return Kernels{
        name,
        [](const Weight4bit& w, DType dtype, void* out, Range blocks) {
            with_type(dtype, out, [&](auto* typed) { dequantize_4bit<Simd>(w, typed, blocks); });
        },
        [](DType dtype, const void* x, std::int64_t n, std::int32_t block_shift, const Encoder4bit& encoder,
           std::uint8_t* codes, float* absmax, Range blocks) {
            with_type(dtype, x, [&](const auto* typed) {
                quantize_4bit<Simd>(typed, n, block_shift, encoder, codes, absmax, blocks);
            });
        },
        quantize_8bit,
        dequantize_8bit,
        dequantize_int8,
        [](DType dtype, const void* x, std::int64_t n, float* out) {
            with_type(dtype, x, [&](const auto* typed) { to_float32<Simd>(typed, n, out); });
        },
        [](const float* x, std::int64_t T, std::int64_t K, const Weight4bit& w, DType dtype, void* out, std::int64_t N,
           Range rows) {
            with_type(dtype, out, [&](auto* typed) { gemv_4bit<Simd>(x, T, K, w, typed, N, rows); });
        },
        [](const WeightGrouped& w, DType dtype, void* out, Range rows) {
            with_codes<Simd>(w.coding, [&](auto codes) {
                using Codes = typename decltype(codes)::type;
                with_type(dtype, out, [&](auto* typed) { dequantize_rows<Simd, Codes>(w, typed, rows); });
            });
        },
        [](const float* x, std::int64_t T, const WeightGrouped& w, DType dtype, void* out, Range rows) {
            with_codes<Simd>(w.coding, [&](auto codes) {
                using Codes = typename decltype(codes)::type;
                with_type(dtype, out, [&](auto* typed) { gemv_grouped<Simd, Codes>(x, T, w, typed, rows); });
            });
        },
        [](const float* x, std::int64_t T, std::int64_t K, DType dtype, const void* w, float* out, std::int64_t N, Range rows) {
            with_type(dtype, w, [&](const auto* typed) { gemv_dense<Simd>(x, T, K, typed, out, N, rows); });
        },
        [](const float* low, std::int64_t stride, std::int64_t T, std::int64_t r, DType dtype, const void* factor, float* out,
           std::int64_t N, Range columns) {
            with_type(dtype, factor, [&](const auto* typed) {
                add_low_rank<Simd>(low, stride, T, r, typed, out, N, columns);
            });
        },
        softmax_row<Simd>,
        rms_norm<Simd>,
        rotate,
        activate_multiply,
        attend<Simd>,
    };
}

}  // namespace
}  // namespace lownibble
