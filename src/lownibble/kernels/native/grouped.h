// Weights packed in groups of a row: decoding and the matrix-vector product, for every code, written against `Simd` like the rest
// of algorithms.h, which includes this.
//
// Codes of 2 to 4 bits: a group's zero point and scale go into a table of 16 values first, so that decoding 16 codes is one
// lookup; shorter tables are repeated, and the index may have any bits above the code. An instruction set without a lookup of 2
// or 3 bits (`kBitLookup`) spreads them over nibbles. Codes of 8 bits are converted and multiplied.
#pragma once

namespace lownibble {
namespace {

// The 16 codes of `Bits` (2 or 3) in 2 * Bits bytes as nibbles, the first in the highest bits of the first byte.
template <int Bits>
inline void spread_nibbles(const std::uint8_t* codes, std::uint8_t* nibbles) {
    std::uint64_t x = 0;
    for (int i = 0; i < 2 * Bits; ++i) x = x << 8 | codes[i];
    if constexpr (Bits == 2) {
        x = (x | x << 16) & 0x0000FFFF0000FFFF;
        x = (x | x << 8) & 0x00FF00FF00FF00FF;
        x = (x | x << 4) & 0x0F0F0F0F0F0F0F0F;
        x = (x | x << 2) & 0x3333333333333333;
    } else {
        x = (x & 0x0000000000FFFFFF) | (x & 0x0000FFFFFF000000) << 8;
        x = (x & 0x00000FFF00000FFF) | (x & 0x00FFF00000FFF000) << 4;
        x = (x & 0x003F003F003F003F) | (x & 0x0FC00FC00FC00FC0) << 2;
        x = (x & 0x0707070707070707) | (x & 0x3838383838383838) << 1;
    }
    for (int i = 0; i < 8; ++i) nibbles[i] = static_cast<std::uint8_t>(x >> (56 - 8 * i));
}

// One code of a string of bits, the first code in the highest bits.
template <int Bits>
inline int bits_at(const std::uint8_t* codes, std::int64_t i) {
    const std::int64_t bit = i * Bits;
    const std::uint8_t* const at = codes + (bit >> 3);
    const int after = 8 - static_cast<int>(bit & 7) - Bits;  // bits of the byte below the code; negative: it continues
    return (after >= 0 ? at[0] >> after : at[0] << -after | at[1] >> (8 + after)) & ((1 << Bits) - 1);
}

// Decoder of a weight's codes. Factor: what a group's codes are decoded with.
template <class Simd, int Bits>
struct PackedCodes {
    using Lanes = typename Simd::Lanes;
    using Factor = Lanes;

    const WeightGrouped w;  // a copy, which stores to the output cannot change: its fields stay in registers
    Lanes table;

    explicit PackedCodes(const WeightGrouped& weight) : w(weight) {
        float repeated[kLanes];
        for (int i = 0; i < kLanes; ++i) repeated[i] = weight.values[i & ((1 << Bits) - 1)];
        table = Simd::load(repeated);
    }
    const std::uint8_t* at(std::int64_t i) const { return w.codes + i * Bits / 8; }
    Factor factor(std::int64_t group) const {
        const float zero = w.zero ? static_cast<float>(bits_at<Bits>(w.zero, group)) : 0.0f;
        return Simd::multiply(Simd::add(table, Simd::fill(-zero)), Simd::fill(block_constant(w, group)));
    }
    // 16 values from element i on, a multiple of 8.
    Lanes decode(const Factor& factor, std::int64_t i) const {
        if constexpr (Bits == 4) {
            return Simd::lookup(factor, at(i));
        } else if constexpr (Simd::kBitLookup) {
            return Simd::template lookup_bits<Bits>(factor, at(i));
        } else {
            std::uint8_t nibbles[8];
            spread_nibbles<Bits>(at(i), nibbles);
            return Simd::lookup(factor, nibbles);
        }
    }
    float one(const Factor& factor, std::int64_t i) const {
        float values[kLanes];
        Simd::store(values, factor);
        return values[bits_at<Bits>(w.codes, i)];
    }
};

template <class Simd, class Byte>
struct ByteCodes {
    using Lanes = typename Simd::Lanes;
    using Factor = Lanes;

    const WeightGrouped w;
    const Byte* codes;

    explicit ByteCodes(const WeightGrouped& weight) : w(weight), codes(reinterpret_cast<const Byte*>(weight.codes)) {}
    const Byte* at(std::int64_t i) const { return codes + i; }
    Factor factor(std::int64_t group) const { return Simd::fill(block_constant(w, group)); }
    Lanes decode(const Factor& factor, std::int64_t i) const { return Simd::multiply(Simd::load(at(i)), factor); }
    float one(const Factor& factor, std::int64_t i) const {
        float values[kLanes];
        Simd::store(values, factor);
        return to_float(codes[i]) * values[0];
    }
};

// Stores 16 values from `column` of the codes on: side by side, or at the columns of the weight.
template <class Simd, bool Stream, bool Ordered, class Out>
inline void put(typename Simd::Lanes values, const std::int32_t* order, Out* out, std::int64_t column) {
    if constexpr (Ordered) {
        Out part[kLanes];
        Simd::store(part, values);
        for (int i = 0; i < kLanes; ++i) out[order[column + i]] = part[i];
    } else if constexpr (Stream) {
        Simd::stream(out + column, values);
    } else {
        Simd::store(out + column, values);
    }
}

template <class Simd, class Codes, bool Stream, bool Ordered, class Out>
void decode_rows(const WeightGrouped& weight, Out* out, Range rows) {
    const Codes codes(weight);
    const WeightGrouped& w = codes.w;
    const std::int64_t groups = w.K / w.group_size;
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
        Out* const to = out + row * w.K;
        for (std::int64_t group = 0; group < groups; ++group) {
            const typename Codes::Factor factor = codes.factor(row * groups + group);
            const std::int64_t end = (group + 1) * w.group_size;
            std::int64_t k = group * w.group_size;
            for (; k + kLanes <= end; k += kLanes) {
                put<Simd, Stream, Ordered>(codes.decode(factor, row * w.K + k), w.order, to, k);
            }
            for (; k < end; ++k) from_float(to + (Ordered ? w.order[k] : k), codes.one(factor, row * w.K + k));
        }
    }
}

// Large outputs go around the caches, as in dequantize_4bit.
template <class Simd, class Codes, class Out>
void dequantize_rows(const WeightGrouped& w, Out* out, Range rows) {
    if (w.order) {
        decode_rows<Simd, Codes, false, true>(w, out, rows);
        return;
    }
    if constexpr (Simd::kStreams && sizeof(Out) == sizeof(float)) {
        const bool aligned = reinterpret_cast<std::uintptr_t>(out) % 64 == 0 && w.K % kLanes == 0 && w.group_size % kLanes == 0;
        if (w.N * w.K >= kStreamElements && aligned) {
            decode_rows<Simd, Codes, true, false>(w, out, rows);
            Simd::fence();
            return;
        }
    }
    decode_rows<Simd, Codes, false, false>(w, out, rows);
}

// R rows of w by T rows of x; see dot_whole_blocks.
template <class Simd, class Codes, int R, int T>
inline void dot_groups(const float* x, const Codes& codes, std::int64_t row, float (&sums)[R][T]) {
    using Lanes = typename Simd::Lanes;
    const WeightGrouped& w = codes.w;
    Lanes totals[R][T];
    float tails[R][T] = {};
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) totals[r][t] = Simd::zero();
    }
    const std::int64_t K = w.K, groups = K / w.group_size;
    for (std::int64_t group = 0; group < groups; ++group) {
        typename Codes::Factor factors[R];
        for (int r = 0; r < R; ++r) {
            factors[r] = codes.factor((row + r) * groups + group);
            __builtin_prefetch(codes.at((row + r + R) * K + group * w.group_size));
        }
        const std::int64_t end = (group + 1) * w.group_size;
        std::int64_t k = group * w.group_size;
        for (; k + kLanes <= end; k += kLanes) {
            for (int r = 0; r < R; ++r) {
                const Lanes weights = codes.decode(factors[r], (row + r) * K + k);
                for (int t = 0; t < T; ++t) totals[r][t] = Simd::fma(weights, Simd::load(x + t * K + k), totals[r][t]);
            }
        }
        for (; k < end; ++k) {
            for (int r = 0; r < R; ++r) {
                const float weight = codes.one(factors[r], (row + r) * K + k);
                for (int t = 0; t < T; ++t) tails[r][t] += weight * x[t * K + k];
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) sums[r][t] = Simd::sum(totals[r][t]) + tails[r][t];
    }
}

template <class Simd, class Codes, class Out>
void gemv_grouped(const float* x, std::int64_t T, const WeightGrouped& weight, Out* out, Range rows) {
    constexpr int kRows = Simd::kRows;
    const Codes codes(weight);
    const WeightGrouped& w = codes.w;
    const auto store = [&](const auto& sums, std::int64_t row, std::int64_t t) {
        for (const auto& of_row : sums) {
            std::int64_t i = t;
            for (const float sum : of_row) from_float(out + i++ * w.N + row, sum);
            ++row;
        }
    };
    const std::int64_t strip = larger(kRows, (std::int64_t{1} << 19) / larger(1, w.K));  // as in gemv_4bit
    for (std::int64_t begin = rows.begin; begin < rows.end; begin += strip) {
        const std::int64_t end = smaller(begin + strip, rows.end);
        std::int64_t t = 0;
        const auto advance = [&](auto tile) {
            for (; t + tile.size <= T; t += tile.size) {
                std::int64_t row = begin;
                for (; row + kRows <= end; row += kRows) {
                    float sums[kRows][tile.size];
                    dot_groups<Simd, Codes, kRows, tile.size>(x + t * w.K, codes, row, sums);
                    store(sums, row, t);
                }
                for (; row < end; ++row) {
                    float sums[1][tile.size];
                    dot_groups<Simd, Codes, 1, tile.size>(x + t * w.K, codes, row, sums);
                    store(sums, row, t);
                }
            }
        };
        if constexpr (Simd::kTile >= 4) advance(Tile<4>{});
        if constexpr (Simd::kTile >= 2) advance(Tile<2>{});
        advance(Tile<1>{});
    }
}

template <class Codes>
struct Type {
    using type = Codes;
};

// Call body with the decoder of the weight's codes, as a Type.
template <class Simd, class Body>
inline void with_codes(Coding coding, Body body) {
    switch (coding) {
        case Coding::bits2: return body(Type<PackedCodes<Simd, 2>>{});
        case Coding::bits3: return body(Type<PackedCodes<Simd, 3>>{});
        case Coding::bits4: return body(Type<PackedCodes<Simd, 4>>{});
        case Coding::int8: return body(Type<ByteCodes<Simd, std::int8_t>>{});
        case Coding::float8: return body(Type<ByteCodes<Simd, Float8>>{});
    }
}

}  // namespace
}  // namespace lownibble
