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

#include <cstdint>
#include <cstring>

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
