// The intrinsics of AVX-512, without the warnings of GCC's own header, the lookup of 16 codes, masks, and a transposition.
#pragma once

// GCC 12 warns about its own header: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
#pragma GCC diagnostic push
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "kernels.h"

namespace lownibble {

// The table's entries for the 16 codes in 8 bytes, high nibble first. Byte i/2 goes to lane i, shifted so that the lane's code is
// in its low four bits; vpermps ignores the others.
static inline __m512 lookup_16(__m512 table, const std::uint8_t* codes) {
    std::int64_t bytes;
    std::memcpy(&bytes, codes, sizeof bytes);
    const __m512i spread = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i shifts = _mm512_set_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4);
    const __m512i lanes = _mm512_shuffle_epi8(_mm512_set1_epi64(bytes), spread);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(lanes, shifts), table);
}

// The same for 16 codes of 2 or 3 bits in 2 * Bits bytes, the first code in the highest bits, in a table repeated to 16 entries. A
// code lies in two neighbouring bytes: these go to its lane, shifted so that the code is in the lowest bits.
template <int Bits>
static inline __m512 lookup_16_bits(__m512 table, const std::uint8_t* codes) {
    struct Places {
        alignas(64) std::uint8_t bytes[64];
        alignas(64) std::int32_t shifts[16];
    };
    static constexpr Places places = [] {
        Places made{};
        for (int i = 0; i < 16; ++i) {
            made.bytes[4 * i] = static_cast<std::uint8_t>(Bits * i / 8 + 1);
            made.bytes[4 * i + 1] = static_cast<std::uint8_t>(Bits * i / 8);
            made.shifts[i] = 16 - Bits - Bits * i % 8;
        }
        return made;
    }();
    std::uint32_t first;
    std::uint16_t rest = 0;
    std::memcpy(&first, codes, sizeof first);
    if constexpr (Bits == 3) std::memcpy(&rest, codes + sizeof first, sizeof rest);
    const __m512i bytes = _mm512_set1_epi64(static_cast<std::int64_t>(std::uint64_t{rest} << 32 | first));
    const __m512i lanes = _mm512_shuffle_epi8(bytes, _mm512_load_si512(places.bytes));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(lanes, _mm512_load_si512(places.shifts)), table);
}

// 16 codes of 8 bits as floats. A float8 (e4m3fn) is a float16 of the same bits, whose exponent is worth 2^8 less; all ones are NaN.
static inline __m512 load_16(const std::int8_t* codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}
static inline __m512 load_16(const Float8* codes) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xBF80)));
    const __mmask16 numbers = _mm256_test_epi16_mask(_mm256_andnot_si256(wide, _mm256_set1_epi16(0x7F)), _mm256_set1_epi16(0x7F));
    const __m256i checked = _mm256_mask_mov_epi16(_mm256_set1_epi16(0x7E00), numbers, half);
    return _mm512_mul_ps(_mm512_cvtph_ps(checked), _mm512_set1_ps(256.0f));
}

// The first `count` of 16 lanes: none below 1, all from 16 on.
static inline __mmask16 first_lanes(std::int64_t count) {
    return count >= 16 ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

// 16 rows of 16 floats -> 16 registers: register j holds float j of each row.
static inline void transpose_floats(__m512 (&rows)[16]) {
    __m512 other[16];
#pragma GCC unroll 4
    for (int stage = 0; stage < 4; ++stage) {
        const __m512i left = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i right = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {  // a perfect shuffle of floats and registers; four of them transpose
            other[2 * i] = _mm512_permutex2var_ps(rows[i], left, rows[i + 8]);
            other[2 * i + 1] = _mm512_permutex2var_ps(rows[i], right, rows[i + 8]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) rows[i] = other[i];
    }
}

}  // namespace lownibble
