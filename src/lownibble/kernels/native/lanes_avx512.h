// AVX-512 for algorithms.h: 16 lanes are one register, and so is the whole table, which vpermps looks up in one instruction.
#pragma once

#include "avx512.h"
#include "kernels.h"

namespace lownibble {
namespace {

struct Avx512 {
    using Lanes = __m512;
    using Table = __m512;
    struct Coder {
        __m512 bounds;   // 15, padded
        __m128i order;   // 16 bytes
    };
    static constexpr bool kStreams = true, kBitLookup = true;
    static constexpr int kTile = 4, kRows = 4, kColumns = 8;

    static Lanes load(const float* p) { return _mm512_loadu_ps(p); }
    static Lanes load(const BFloat16* p) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static Lanes load(const Float16* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static Lanes load(const std::int8_t* p) { return load_16(p); }
    static Lanes load(const Float8* p) { return load_16(p); }

    static void store(float* p, Lanes v) { _mm512_storeu_ps(p, v); }
    // To nearest even by integers: vcvtneps2bf16 is an extension of its own and flushes subnormals.
    static void store(BFloat16* p, Lanes v) {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF)), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        const __m512i checked = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7FC0));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(checked));
    }
    static void store(Float16* p, Lanes v) {
        const __m256i halves = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
    }

    static void stream(float* p, Lanes v) { _mm512_stream_ps(p, v); }
    static void fence() { _mm_sfence(); }

    static Lanes zero() { return _mm512_setzero_ps(); }
    static Lanes fill(float value) { return _mm512_set1_ps(value); }
    static Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
    static Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
    static Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
    static float sum(Lanes v) { return _mm512_reduce_add_ps(v); }
    static Lanes absolute(Lanes v) { return _mm512_abs_ps(v); }
    static Lanes maximum(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
    static float largest(Lanes v) { return _mm512_reduce_max_ps(v); }
    static Lanes clamp_to_one(Lanes v) { return _mm512_min_ps(_mm512_max_ps(v, fill(-1.0f)), fill(1.0f)); }

    static Table table(const float* values) { return load(values); }
    static Table scaled(Table t, float constant) { return _mm512_mul_ps(t, fill(constant)); }
    static Lanes lookup(Table t, const std::uint8_t* codes) { return lookup_16(t, codes); }
    template <int Bits>
    static Lanes lookup_bits(Table t, const std::uint8_t* codes) {
        return lookup_16_bits<Bits>(t, codes);
    }

    static Coder coder(const Encoder4bit& encoder) {
        return {_mm512_maskz_loadu_ps(0x7FFF, encoder.bounds),
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(encoder.order))};
    }
    // The index is the number of bounds below the value: four steps of a binary search.
    static void encode(std::uint8_t* codes, Lanes v, const Coder& coder) {
        __m512i index = _mm512_setzero_si512();
        for (int step = 8; step; step >>= 1) {
            const __m512 bound = _mm512_permutexvar_ps(_mm512_add_epi32(index, _mm512_set1_epi32(step - 1)), coder.bounds);
            const __mmask16 above = _mm512_cmp_ps_mask(v, bound, _CMP_GT_OQ);
            index = _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(step));
        }
        const __m128i ordered = _mm_shuffle_epi8(coder.order, _mm512_cvtepi32_epi8(index));
        const __m128i pairs = _mm_maddubs_epi16(ordered, _mm_set1_epi16(0x0110));  // 16 * first + second
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packus_epi16(pairs, pairs));
    }
};

}  // namespace
}  // namespace lownibble
