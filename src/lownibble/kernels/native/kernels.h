// Shared by every translation unit: plain data types, the table of kernels that each instruction set fills in, and scalar
// conversions.
//
// Design. One shared library, plain C ABI, plain pointers, no libtorch: it builds in seconds and works with any torch.
//
//   isa_scalar.cpp isa_avx2.cpp isa_avx512.cpp isa_neon.cpp   16 lanes of float and a 16-entry table, in that instruction set
//   algorithms.h                                             the operations, once, written against those 16 lanes
//   decoder.cpp                                              a whole decoder layer out of them
//   dispatch.cpp                                             choice by CPUID, threads, the exported C functions
//
// Each isa_*.cpp is compiled with its own flags, so nothing that is not inlined may be shared between them: a function in a
// named namespace could be emitted with AVX-512 instructions and then be linked into the scalar path. Everything here is
// therefore data or `static inline`, and algorithms.h lives in an anonymous namespace. For the same reason no header of the
// C++ library is used in them.
//
// Numerics. Decoding is table[code] * constant, rounded once to float32 and once more to the output type. A block's table is
// multiplied by its constant first (16 products for a block of 64 elements or more); the products are the same, so the bits
// are the same. Double quantised constants are decoded with two roundings. The flag -ffp-contract=off keeps the compiler from
// fusing them; FMA appears only in the matrix-vector product, explicitly. Encoding follows kernels/reference.py bit by bit.
#pragma once

#include <cstdint>
#include <cstring>

namespace lownibble {

enum class DType : std::int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

enum class Activation : std::int32_t { silu = 0, gelu_tanh = 1 };

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

// A range of blocks or rows, one thread's share.
struct Range {
    std::int64_t begin, end;
};

// A 4-bit tensor of n elements: two codes a byte, the first in the high nibble; one constant a block of 2^block_shift (>= 16).
struct Weight4bit {
    const std::uint8_t* codes;
    const float* values;          // 16, by code
    const void* absmax;           // float per block; or uint8 per block when nested_values is set
    const float* nested_values;   // 256, or null
    const float* nested_absmax;   // one per 2^nested_shift blocks
    const float* nested_offset;   // one
    std::int64_t n;
    std::int32_t block_shift;
    std::int32_t nested_shift;
};

// How the codes of a grouped weight lie: strings of bits, the first in the highest bits; or bytes.
enum class Coding : std::int32_t { bits2 = 2, bits3 = 3, bits4 = 4, int8 = 8, float8 = 9 };

struct Float8 {  // e4m3fn
    std::uint8_t bits;
};

// A weight (N, K) in groups of group_size neighbours in a row: (values[code] - zero) * constant. Groups start at whole bytes.
struct WeightGrouped {
    const std::uint8_t* codes;
    const float* values;          // one a code; not read for codes of 8 bits
    const void* absmax;           // the scale of each group, stored as the constants of Weight4bit
    const float* nested_values;
    const float* nested_absmax;
    const float* nested_offset;
    const std::uint8_t* zero;     // codes of zero points, packed as the codes are, or null
    const std::int32_t* order;    // K: the column of each column of codes, or null
    std::int64_t N, K, group_size;
    std::int32_t nested_shift;
    Coding coding;
};

struct Encoder4bit {
    const float* bounds;          // 15, ascending; a value on a bound takes the lower code
    const std::uint8_t* order;    // 16, code of the i-th smallest value
};

// Added to the product: bias (or null), and low (T, r) times factor, whose element (i, column) is
// factor[i * step + column * stride].
struct Addition {
    const float* bias;
    const float* low;
    const float* factor;
    std::int64_t r, step, stride;
    float scale;
};

// One instruction set's kernels, single-threaded, each over a range.
struct Kernels {
    const char* name;
    void (*dequantize_4bit)(const Weight4bit&, DType, void* out, Range blocks);
    void (*quantize_4bit)(DType, const void* x, std::int64_t n, std::int32_t block_shift, const Encoder4bit&,
                          std::uint8_t* codes, float* absmax, Range blocks);
    void (*quantize_8bit)(const float* x, std::int64_t n, std::int32_t block_shift, const std::uint8_t* lookup,
                          std::uint8_t* codes, float* absmax, Range blocks);
    void (*dequantize_8bit)(const std::uint8_t* codes, const float* absmax, const float* values, std::int64_t n,
                            std::int32_t block_shift, float* out, Range blocks);
    // out[i] = codes[i] * scale[i / group] for n values from a group's beginning on.
    void (*dequantize_int8)(const std::int8_t* codes, const float* scale, std::int64_t group, std::int64_t n, float* out);
    void (*to_float32)(DType, const void* x, std::int64_t n, float* out);
    // x (T, K) float32 by w (N, K) -> out (T, N), for the rows of w in `rows`.
    void (*gemv_4bit)(const float* x, std::int64_t T, std::int64_t K, const Weight4bit& w, DType, void* out, std::int64_t N,
                      Range rows);
    void (*dequantize_grouped)(const WeightGrouped& w, DType, void* out, Range rows);
    // As gemv_4bit; w has no order.
    void (*gemv_grouped)(const float* x, std::int64_t T, const WeightGrouped& w, DType, void* out, Range rows);
    // x (T, K) by w (N, K) -> out (T, N), for the rows of w in `rows`.
    void (*gemv_dense)(const float* x, std::int64_t T, std::int64_t K, DType, const void* w, float* out, std::int64_t N,
                       Range rows);
    // out (T, N) += low (T, r) by factor (r, N), for the columns in `columns`; rows of low are `stride` apart.
    void (*add_low_rank)(const float* low, std::int64_t stride, std::int64_t T, std::int64_t r, DType, const void* factor,
                         float* out, std::int64_t N, Range columns);
    // x := scale * softmax(x); returns the logarithm of the sum of exponentials.
    float (*softmax_row)(float* x, std::int64_t n, float scale);
    // For decoder.cpp, each over one row of n floats. `out` may be `x`.
    void (*rms_norm)(const float* x, const float* weight, std::int64_t n, float eps, float* out);
    void (*rotate)(const float* x, const float* cosine, const float* sine, std::int64_t n, float* out);  // halves; n is even
    void (*activate_multiply)(Activation, const float* gate, const float* up, std::int64_t n, float* out);
    // softmax(scaling * q K^T) V over `count` rows of `keys` and `values`, (count, n); `scores` is memory for `count` floats.
    // Scores s are softcap * tanh(s / softcap), unless that is 0.
    void (*attend)(const float* q, const float* keys, const float* values, std::int64_t count, std::int64_t n, float scaling,
                   float softcap, float* scores, float* out);
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kNeonKernels;

static inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// The constant of a block or group: as stored, or decoded with two roundings.
template <class Weight>
static inline float block_constant(const Weight& w, std::int64_t block) {
    if (!w.nested_values) return static_cast<const float*>(w.absmax)[block];
    const std::uint8_t code = static_cast<const std::uint8_t*>(w.absmax)[block];
    const float product = w.nested_values[code] * w.nested_absmax[block >> w.nested_shift];
    return product + *w.nested_offset;
}

static inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float to_float(float value) { return value; }

static inline float to_float(BFloat16 value) { return float_of(static_cast<std::uint32_t>(value.bits) << 16); }

static inline float to_float(Float16 value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    const std::uint32_t exponent = value.bits >> 10 & 0x1F, fraction = value.bits & 0x3FF;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact
        return float_of(sign | bits_of(static_cast<float>(fraction) * float_of(0x33800000)));
    }
    if (exponent == 31) return float_of(sign | 0x7F800000 | fraction << 13);
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

static inline float to_float(std::int8_t value) { return value; }

// As a float16 of the same bits, whose exponent is worth 2^8 less; all ones are NaN.
static inline float to_float(Float8 value) {
    const bool is_nan = (value.bits & 0x7F) == 0x7F;
    const std::uint32_t sign = (value.bits & 0x80u) << 8, magnitude = is_nan ? 0x7E00u : (value.bits & 0x7Fu) << 7;
    return to_float(Float16{static_cast<std::uint16_t>(sign | magnitude)}) * 256.0f;
}

static inline void from_float(float* out, float value) { *out = value; }

static inline void from_float(BFloat16* out, float value) {
    const std::uint32_t bits = bits_of(value);
    const bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    out->bits = static_cast<std::uint16_t>(is_nan ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // to nearest even
}

static inline void from_float(Float16* out, float value) {
    const std::uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFF, sign = bits >> 16 & 0x8000;
    std::uint32_t half;
    if (magnitude > 0x7F800000) {
        half = 0x7E00;                                   // NaN
    } else if (magnitude >= 0x477FF000) {
        half = 0x7C00;                                   // 65520 and above round to infinity
    } else if (magnitude < 0x38800000) {                 // subnormal: adding 0.5 lets the FPU round at 2^-24
        half = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000;
    } else {
        half = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;  // to nearest even
    }
    out->bits = static_cast<std::uint16_t>(sign | half);
}

}  // namespace lownibble
