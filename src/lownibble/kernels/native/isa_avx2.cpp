// AVX2 + FMA + F16C: 16 lanes are two registers, and the table is two registers of eight entries, chosen by the code's high bit.
#if defined(__x86_64__)

#include <immintrin.h>

#include "algorithms.h"

namespace lownibble {
namespace {

struct Avx2 {
    struct Lanes {
        __m256 low, high;
    };
    using Table = Lanes;
    struct Coder {
        const float* bounds;
        __m128i order;  // 16 bytes
    };
    static constexpr bool kStreams = true, kBitLookup = false;
    static constexpr int kTile = 4, kRows = 1, kColumns = 4;

    static Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static Lanes load(const BFloat16* p) { return {widen(p), widen(p + 8)}; }
    static Lanes load(const Float16* p) { return {widen(p), widen(p + 8)}; }
    static Lanes load(const std::int8_t* p) { return {widen(p), widen(p + 8)}; }
    static Lanes load(const Float8* p) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xBF80)));
        const __m256i all = _mm256_set1_epi16(0x7F), nan = _mm256_cmpeq_epi16(_mm256_and_si256(wide, all), all);
        const __m256i checked = _mm256_blendv_epi8(half, _mm256_set1_epi16(0x7E00), nan);
        const Lanes small{_mm256_cvtph_ps(_mm256_castsi256_si128(checked)), _mm256_cvtph_ps(_mm256_extracti128_si256(checked, 1))};
        return multiply(small, fill(256.0f));  // as in avx512.h
    }

    static void store(float* p, Lanes v) {
        _mm256_storeu_ps(p, v.low);
        _mm256_storeu_ps(p + 8, v.high);
    }
    static void store(BFloat16* p, Lanes v) {
        const __m256i packed = _mm256_packus_epi32(to_bfloat16(v.low), to_bfloat16(v.high));  // quarters 0 2 1 3
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
    }
    static void store(Float16* p, Lanes v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT));
    }

    static void stream(float* p, Lanes v) {
        _mm256_stream_ps(p, v.low);
        _mm256_stream_ps(p + 8, v.high);
    }
    static void fence() { _mm_sfence(); }

    static Lanes zero() { return fill(0.0f); }
    static Lanes fill(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
    static Lanes multiply(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
    static Lanes fma(Lanes a, Lanes b, Lanes c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static float sum(Lanes v) {
        const __m256 eight = _mm256_add_ps(v.low, v.high);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static Lanes absolute(Lanes v) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, v.low), _mm256_andnot_ps(sign, v.high)};
    }
    static Lanes maximum(Lanes a, Lanes b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
    static float largest(Lanes v) {
        const __m256 eight = _mm256_max_ps(v.low, v.high);
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    static Lanes clamp_to_one(Lanes v) {
        const __m256 one = _mm256_set1_ps(1.0f), minus_one = _mm256_set1_ps(-1.0f);
        return {_mm256_min_ps(_mm256_max_ps(v.low, minus_one), one), _mm256_min_ps(_mm256_max_ps(v.high, minus_one), one)};
    }

    static Table table(const float* values) { return load(values); }
    static Table scaled(Table t, float constant) { return multiply(t, fill(constant)); }
    static Lanes lookup(const Table& t, const std::uint8_t* codes) { return {lookup_8(t, codes), lookup_8(t, codes + 4)}; }

    static Coder coder(const Encoder4bit& encoder) {
        return {encoder.bounds, _mm_loadu_si128(reinterpret_cast<const __m128i*>(encoder.order))};
    }
    // The index is the number of bounds below the value; a true comparison is -1.
    static void encode(std::uint8_t* codes, Lanes v, const Coder& coder) {
        __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
        for (int i = 0; i < 15; ++i) {
            const __m256 bound = _mm256_broadcast_ss(coder.bounds + i);
            low = _mm256_sub_epi32(low, _mm256_castps_si256(_mm256_cmp_ps(v.low, bound, _CMP_GT_OQ)));
            high = _mm256_sub_epi32(high, _mm256_castps_si256(_mm256_cmp_ps(v.high, bound, _CMP_GT_OQ)));
        }
        const __m128i index = _mm_packus_epi16(pack_8(low), pack_8(high));
        const __m128i ordered = _mm_shuffle_epi8(coder.order, index);
        const __m128i pairs = _mm_maddubs_epi16(ordered, _mm_set1_epi16(0x0110));  // 16 * first + second
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packus_epi16(pairs, pairs));
    }

private:
    static __m256 widen(const BFloat16* p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static __m256 widen(const std::int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static __m256 widen(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

    // To nearest even; a NaN stays one.
    static __m256i to_bfloat16(__m256 v) {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF)), 16);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    }

    // Four bytes go to all eight lanes, shifted so that lane i's code is in its low four bits.
    static __m256 lookup_8(const Table& t, const std::uint8_t* codes) {
        std::int32_t bytes;
        std::memcpy(&bytes, codes, sizeof bytes);
        const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), _mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4));
        const __m256 high_bit = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), high_bit);
    }

    static __m128i pack_8(__m256i v) { return _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)); }
};

}  // namespace

const Kernels kAvx2Kernels = kernels_for<Avx2>("avx2");

}  // namespace lownibble

#endif
