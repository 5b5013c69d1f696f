// The intrinsics of AVX-512, without the warnings of GCC's own header, the lookup of 16 codes, and masks.
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

}  // namespace lownibble
