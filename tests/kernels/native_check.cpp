// Compares every instruction set that this machine runs with the scalar kernels on random data, without Python or torch.
//
// For machines that the test suite does not run on: cross-compile together with src/lownibble/kernels/native/*.cpp and run
// under an emulator (test_native_check.py does so for aarch64), or build with sanitizers. Buffers end where the tensors end, so
// that AddressSanitizer sees a read or write past them. Prints one line for each instruction set; exits with 1 on a difference.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "decoder.h"
#include "kernels.h"

extern "C" {
const char* lownibble_available();
std::int32_t lownibble_select(const char*);
void lownibble_dequantize_4bit(const std::uint8_t*, const float*, const void*, const float*, const float*, const float*,
                               std::int64_t, std::int32_t, std::int32_t, std::int32_t, void*, std::int32_t);
void lownibble_quantize_4bit(const void*, std::int32_t, std::int64_t, std::int32_t, const float*, const std::uint8_t*,
                             std::uint8_t*, float*, std::int32_t);
std::int32_t lownibble_quantize_sum_4bit(const std::int8_t*, const float*, std::int64_t, const float*, const float*, std::int64_t,
                                         std::int64_t, std::int64_t, std::int32_t, const float*, const std::uint8_t*,
                                         std::uint8_t*, float*, std::int32_t);
void lownibble_quantize_8bit(const float*, std::int64_t, std::int32_t, const std::uint8_t*, std::uint8_t*, float*, std::int32_t);
void lownibble_dequantize_8bit(const std::uint8_t*, const float*, const float*, std::int64_t, std::int32_t, float*,
                               std::int32_t);
std::int32_t lownibble_gemv_4bit(const void*, std::int32_t, std::int64_t, std::int64_t, const std::uint8_t*, const float*,
                                 const void*, const float*, const float*, const float*, std::int64_t, std::int32_t,
                                 std::int32_t, void*, std::int32_t);
std::int32_t lownibble_has_int8();
void lownibble_row_scales(const std::uint8_t*, const float*, const void*, const float*, const float*, const float*, std::int64_t,
                          std::int64_t, std::int32_t, std::int32_t, float*, std::int32_t);
void lownibble_quantize_rows(const float*, const float*, std::int64_t, std::int64_t, std::int8_t*, float*, std::int32_t*,
                             std::int32_t);
std::int32_t lownibble_matmul_int8(const std::int8_t*, const float*, const std::int32_t*, std::int64_t, const std::uint8_t*,
                                   const float*, const void*, const float*, const float*, const float*, std::int64_t,
                                   std::int64_t, std::int32_t, std::int32_t, std::int32_t, const float*, const float*,
                                   const float*, const float*, std::int64_t, std::int64_t, std::int64_t, float, float*,
                                   std::int32_t);
std::int32_t lownibble_matmul_int8_dense(const std::int8_t*, const float*, const std::int32_t*, std::int64_t, const float*,
                                         std::int64_t, std::int64_t, std::int32_t, const float*, float*, std::int32_t);
std::int32_t lownibble_has_matmul();
std::int32_t lownibble_matmul_4bit(const float*, std::int64_t, const std::uint8_t*, const float*, const void*, const float*,
                                   const float*, const float*, std::int64_t, std::int64_t, std::int32_t, std::int32_t,
                                   std::int32_t, const float*, const float*, const float*, std::int64_t, std::int64_t,
                                   std::int64_t, float, float*, std::int32_t);
void lownibble_dequantize_grouped(const std::uint8_t*, std::int32_t, const float*, const void*, const float*, const float*,
                                  const float*, std::int32_t, const std::uint8_t*, const std::int32_t*, std::int64_t, std::int64_t,
                                  std::int64_t, std::int32_t, void*, std::int32_t);
std::int32_t lownibble_gemv_grouped(const void*, std::int32_t, std::int64_t, const std::uint8_t*, std::int32_t, const float*,
                                    const void*, const float*, const float*, const float*, std::int32_t, const std::uint8_t*,
                                    std::int64_t, std::int64_t, std::int64_t, void*, std::int32_t);
std::int32_t lownibble_matmul_grouped(const float*, std::int64_t, const std::uint8_t*, std::int32_t, const float*, const void*,
                                      const float*, const float*, const float*, std::int32_t, const std::uint8_t*, std::int64_t,
                                      std::int64_t, std::int64_t, std::int32_t, const float*, const float*, const float*,
                                      std::int64_t, std::int64_t, std::int64_t, float, float*, std::int32_t);
std::int32_t lownibble_matmul_dense(const float*, std::int64_t, const float*, std::int64_t, std::int64_t, std::int32_t,
                                    const float*, const float*, const float*, std::int64_t, std::int64_t, std::int64_t, float,
                                    float*, std::int32_t);
std::int32_t lownibble_outer(const float*, const float*, std::int64_t, std::int64_t, std::int64_t, std::int32_t, float*, std::int32_t);
std::int64_t lownibble_decoder_workspace(const lownibble::DecoderLayer*, std::int64_t, std::int64_t, std::int64_t, std::int32_t);
std::int32_t lownibble_decoder_layers(const lownibble::DecoderLayer*, std::int64_t, const lownibble::Tokens*, std::int64_t, float*,
                                      std::int32_t);
std::int32_t lownibble_has_attention();
std::int32_t lownibble_attention(const float*, const float*, const float*, float*, const std::int64_t*, float*, const std::int64_t*,
                                 std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, float, std::int32_t);
std::int32_t lownibble_attention_backward(const float*, const float*, const float*, const float*, const float*, float*, float*,
                                          float*, const std::int64_t*, const float*, const std::int64_t*, std::int64_t,
                                          std::int64_t, std::int64_t, std::int64_t, std::int64_t, float, std::int32_t);
std::int32_t lownibble_has_low_rank();
std::int32_t lownibble_low_rank(const float*, std::int64_t, std::int64_t, const float*, std::int64_t, std::int64_t, std::int64_t, float,
                                float*, std::int32_t);
std::int64_t lownibble_low_rank_sums(std::int64_t, std::int64_t, std::int64_t, std::int64_t);
std::int32_t lownibble_low_rank_backward(const float*, const float*, const float*, std::int64_t, std::int64_t, std::int64_t,
                                         const float*, std::int64_t, std::int64_t, std::int64_t, float, float*, float*, float*,
                                         float*, std::int32_t);
void lownibble_gemv_bf16(const float*, std::int64_t, std::int64_t, const void*, float*, std::int64_t, std::int32_t);
}

namespace {

using namespace lownibble;

constexpr std::int32_t kThreads = 2, kNestedShift = 8;
using Bytes = std::vector<std::uint8_t>;
using Floats = std::vector<float>;

std::uint32_t random_state = 1;

std::uint32_t random_bits() { return random_state = random_state * 1664525 + 1013904223; }

// Roughly normal, with a few outliers.
float random_float() {
    float sum = 0;
    for (int i = 0; i < 6; ++i) sum += static_cast<float>(random_bits() >> 8) / 16777216.0f - 0.5f;
    return random_bits() >> 24 == 0 ? sum * 1000 : sum;
}

std::size_t width_of(std::int32_t dtype) { return dtype == 0 ? 4 : 2; }

Bytes encode_as(std::int32_t dtype, const Floats& values) {
    Bytes bytes(values.size() * width_of(dtype));
    for (std::size_t i = 0; i < values.size(); ++i) {
        BFloat16 brain;
        Float16 half;
        from_float(&brain, values[i]);
        from_float(&half, values[i]);
        const void* const sources[] = {&values[i], &brain, &half};
        const void* source = sources[dtype];
        std::memcpy(bytes.data() + i * width_of(dtype), source, width_of(dtype));
    }
    return bytes;
}

float decode_at(std::int32_t dtype, const Bytes& bytes, std::size_t i) {
    float value;
    BFloat16 brain;
    Float16 half;
    if (dtype == 0) return std::memcpy(&value, bytes.data() + 4 * i, 4), value;
    if (dtype == 1) return std::memcpy(&brain, bytes.data() + 2 * i, 2), to_float(brain);
    return std::memcpy(&half, bytes.data() + 2 * i, 2), to_float(half);
}

struct Case {
    std::int64_t N, K;
    std::int32_t block_shift, dtype;
    std::int64_t T;
};

// Everything that an instruction set computes for one case, from the same inputs.
struct Results {
    Bytes codes, absmax_codes, decoded, decoded_nested, gemv, gemv_nested, sum_codes;
    Floats absmax, nested_absmax, decoded_absmax, sum_absmax;
};

struct Tables {
    Floats values, bounds, nested_values;
    Bytes order, lookup;
};

Tables make_tables() {
    Tables tables;
    for (int i = 0; i < 16; ++i) tables.values.push_back((i * 2 - 15) / 15.0f);
    for (int i = 0; i < 15; ++i) tables.bounds.push_back((tables.values[i] + tables.values[i + 1]) / 2);
    for (int i = 0; i < 16; ++i) tables.order.push_back(static_cast<std::uint8_t>(i));
    for (int i = 0; i < 256; ++i) tables.nested_values.push_back((i - 127.5f) / 127.5f);
    for (int i = 0; i < 65536; ++i) tables.lookup.push_back(static_cast<std::uint8_t>(i >> 8));
    return tables;
}

std::int64_t divided_up(std::int64_t n, std::int32_t shift) { return (n + (std::int64_t{1} << shift) - 1) >> shift; }

Results compute(const Case& c, const Tables& tables, const Bytes& weights, const Bytes& x) {
    const std::int64_t n = c.N * c.K, blocks = divided_up(n, c.block_shift), nested_blocks = divided_up(blocks, kNestedShift);
    const float offset = 0.5f;
    Results r;
    r.codes.resize((n + 1) / 2);
    r.absmax.resize(blocks);
    lownibble_quantize_4bit(weights.data(), c.dtype, n, c.block_shift, tables.bounds.data(), tables.order.data(), r.codes.data(),
                            r.absmax.data(), kThreads);
    Floats centred = r.absmax;
    for (float& value : centred) value -= offset;
    r.absmax_codes.resize(blocks);
    r.nested_absmax.resize(nested_blocks);
    r.decoded_absmax.resize(blocks);
    lownibble_quantize_8bit(centred.data(), blocks, kNestedShift, tables.lookup.data(), r.absmax_codes.data(),
                            r.nested_absmax.data(), kThreads);
    lownibble_dequantize_8bit(r.absmax_codes.data(), r.nested_absmax.data(), tables.nested_values.data(), blocks, kNestedShift,
                              r.decoded_absmax.data(), kThreads);
    for (bool nested : {false, true}) {
        const void* absmax = nested ? static_cast<const void*>(r.absmax_codes.data()) : r.absmax.data();
        const float* nested_values = nested ? tables.nested_values.data() : nullptr;
        Bytes& decoded = nested ? r.decoded_nested : r.decoded;
        decoded.resize(n * width_of(c.dtype));
        lownibble_dequantize_4bit(r.codes.data(), tables.values.data(), absmax, nested_values, r.nested_absmax.data(), &offset, n,
                                  c.block_shift, kNestedShift, c.dtype, decoded.data(), kThreads);
        Bytes& product = nested ? r.gemv_nested : r.gemv;
        product.resize(c.T * c.N * width_of(c.dtype));
        if (lownibble_gemv_4bit(x.data(), c.dtype, c.T, c.K, r.codes.data(), tables.values.data(), absmax, nested_values,
                                r.nested_absmax.data(), &offset, c.N, c.block_shift, kNestedShift, product.data(), kThreads)) {
            std::abort();
        }
    }
    std::vector<std::int8_t> base(n);  // sums of these are exact, in any order
    Floats scale(c.N, 0.25f), low(c.N * 3), a(3 * c.K);
    for (std::int64_t i = 0; i < n; ++i) base[i] = static_cast<std::int8_t>(i * 37 % 255 - 127);
    for (std::size_t i = 0; i < low.size(); ++i) low[i] = static_cast<float>(i * 5 % 9) - 4.0f;
    for (std::size_t i = 0; i < a.size(); ++i) a[i] = (static_cast<float>(i * 7 % 9) - 4.0f) / 8.0f;
    r.sum_codes.resize((n + 1) / 2);
    r.sum_absmax.resize(blocks);
    if (n && lownibble_quantize_sum_4bit(base.data(), scale.data(), c.K, low.data(), a.data(), c.N, c.K, 3, c.block_shift,
                                         tables.bounds.data(), tables.order.data(), r.sum_codes.data(), r.sum_absmax.data(),
                                         kThreads)) {
        std::abort();
    }
    return r;
}

// Same products, summed in another order: the differences stay within K roundings of the sum of magnitudes, plus one rounding
// to the output type on each side.
bool close_products(const Case& c, const Bytes& x, const Tables& tables, const Results& scalar, const Bytes& a, const Bytes& b,
                    bool nested) {
    const double roundoff = c.dtype == 0 ? std::ldexp(1.0, -24) : c.dtype == 1 ? std::ldexp(1.0, -8) : std::ldexp(1.0, -11);
    for (std::int64_t t = 0; t < c.T; ++t) {
        for (std::int64_t row = 0; row < c.N; ++row) {
            double magnitudes = 0;
            for (std::int64_t k = 0; k < c.K; ++k) {
                const std::int64_t i = row * c.K + k, block = i >> c.block_shift;
                const int code = i & 1 ? scalar.codes[i / 2] & 15 : scalar.codes[i / 2] >> 4;
                const float constant = nested ? scalar.decoded_absmax[block] + 0.5f : scalar.absmax[block];
                magnitudes += std::fabs(static_cast<double>(tables.values[code]) * constant * decode_at(c.dtype, x, t * c.K + k));
            }
            const double first = decode_at(c.dtype, a, t * c.N + row), second = decode_at(c.dtype, b, t * c.N + row);
            const double summed = 2 * (c.K + 1) * std::ldexp(magnitudes, -24);
            const double bound = summed + 2 * roundoff * std::fabs(first) + std::ldexp(1.0, -24);
            if (first != second && !(std::fabs(first - second) <= bound)) return false;  // equal covers infinities
        }
    }
    return true;
}

template <class Value>
bool same(const std::vector<Value>& a, const std::vector<Value>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Value)) == 0);
}

const char* difference(const Case& c, const Tables& tables, const Bytes& x, const Results& scalar, const Results& other) {
    if (!same(scalar.codes, other.codes)) return "quantize_4bit codes";
    if (!same(scalar.absmax, other.absmax)) return "quantize_4bit absmax";
    if (!same(scalar.sum_codes, other.sum_codes)) return "quantize_sum_4bit codes";
    if (!same(scalar.sum_absmax, other.sum_absmax)) return "quantize_sum_4bit absmax";
    if (!same(scalar.absmax_codes, other.absmax_codes)) return "quantize_8bit codes";
    if (!same(scalar.nested_absmax, other.nested_absmax)) return "quantize_8bit absmax";
    if (!same(scalar.decoded_absmax, other.decoded_absmax)) return "dequantize_8bit";
    if (!same(scalar.decoded, other.decoded)) return "dequantize_4bit";
    if (!same(scalar.decoded_nested, other.decoded_nested)) return "dequantize_4bit with nested constants";
    if (!close_products(c, x, tables, scalar, scalar.gemv, other.gemv, false)) return "gemv_4bit";
    if (!close_products(c, x, tables, scalar, scalar.gemv_nested, other.gemv_nested, true)) return "gemv_4bit, nested constants";
    return nullptr;
}

// x W^T and x W with a bias and two terms of a low-rank branch, against sums in double precision. Buffers have their exact sizes.
bool products_hold(std::int64_t T, std::int64_t N, std::int64_t K, std::int32_t block_shift, const Tables& tables) {
    const std::int64_t n = N * K, r = 2;
    Bytes codes(n / 2);
    for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(random_bits() >> 24);
    Floats absmax(divided_up(n, block_shift));
    for (float& value : absmax) value = random_float();
    Floats dense(n);
    for (std::int64_t i = 0; i < n; ++i) {
        dense[i] = tables.values[i & 1 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * absmax[i >> block_shift];
    }
    Floats left(N * T), outer(T * K), more(T * K, 1.0f);  // left^T dense, and that added to ones
    for (float& value : left) value = random_float();
    if (lownibble_outer(left.data(), dense.data(), N, T, K, 0, outer.data(), kThreads) ||
        lownibble_outer(left.data(), dense.data(), N, T, K, 1, more.data(), kThreads)) {
        return false;
    }
    for (std::int64_t t = 0; t < T; ++t) {
        for (std::int64_t k = 0; k < K; ++k) {
            double sum = 0.0, magnitudes = 1.0;
            for (std::int64_t row = 0; row < N; ++row) {
                const double term = static_cast<double>(left[row * T + t]) * dense[row * K + k];
                sum += term;
                magnitudes += std::fabs(term);
            }
            const double bound = (N + 1) * std::ldexp(magnitudes, -24);
            if (std::fabs(outer[t * K + k] - sum) > bound || std::fabs(more[t * K + k] - 1.0 - sum) > bound) return false;
        }
    }
    for (bool transposed : {false, true}) {
        const std::int64_t terms = transposed ? N : K, columns = transposed ? K : N;
        Floats x(T * terms), bias(columns), low(T * r), factor(r * columns), out(T * columns), plain(T * columns), added(T * columns);
        for (Floats* values : {&x, &bias, &low, &factor}) {
            for (float& value : *values) value = random_float();
        }
        if (lownibble_matmul_4bit(x.data(), T, codes.data(), tables.values.data(), absmax.data(), nullptr, nullptr, nullptr, N,
                                  K, block_shift, 0, transposed, bias.data(), low.data(), factor.data(), r, columns, 1, 0.5f,
                                  out.data(), kThreads)) {
            return false;
        }
        if (lownibble_matmul_dense(x.data(), T, dense.data(), N, K, transposed, nullptr, nullptr, nullptr, 0, 0, 0, 0.0f,
                                   plain.data(), kThreads) ||
            lownibble_matmul_dense(x.data(), T, dense.data(), N, K, transposed, bias.data(), low.data(), factor.data(), r, columns,
                                   1, 0.5f, added.data(), kThreads)) {
            return false;
        }
        for (std::int64_t t = 0; t < T; ++t) {
            for (std::int64_t c = 0; c < columns; ++c) {
                double sum = 0.0, magnitudes = 0.0;
                for (std::int64_t k = 0; k < terms; ++k) {
                    const double term = static_cast<double>(x[t * terms + k]) * dense[transposed ? k * K + c : c * K + k];
                    sum += term;
                    magnitudes += std::fabs(term);
                }
                if (std::fabs(plain[t * columns + c] - sum) > terms * std::ldexp(magnitudes, -24)) return false;
                sum += bias[c];
                magnitudes += std::fabs(bias[c]);
                for (std::int64_t j = 0; j < r; ++j) {
                    const double term = 0.5 * low[t * r + j] * factor[j * columns + c];
                    sum += term;
                    magnitudes += std::fabs(term);
                }
                for (const Floats* found : {&out, &added}) {
                    if (std::fabs((*found)[t * columns + c] - sum) > (terms + r + 3) * std::ldexp(magnitudes, -24)) return false;
                }
            }
        }
    }
    return true;
}

// Grouped weights of every coding, in order and permuted: decoded as the formula says, and products against sums in double
// precision. Buffers have their exact sizes.
bool grouped_holds(std::int64_t T, std::int64_t N, std::int64_t K, std::int64_t size, const Tables& tables) {
    const std::int64_t n = N * K, groups = n / size;
    Floats scale(groups), x(T * std::max(N, K));
    for (Floats* values : {&scale, &x}) {
        for (float& value : *values) value = random_float();
    }
    std::vector<std::int32_t> order(K);
    for (std::int64_t k = 0; k < K; ++k) order[k] = static_cast<std::int32_t>((k * 5 + 1) % K);  // K is no multiple of 5
    for (std::int32_t coding : {2, 3, 4, 8, 9}) {
        const int bits = coding < 8 ? coding : 8, unit = bits == 3 ? 3 : 1;  // whole bytes and codes
        const auto bytes_of = [&](std::int64_t count) { return (count * bits + 8 * unit - 1) / (8 * unit) * unit; };
        Bytes codes(bytes_of(n)), zero(bytes_of(groups));
        for (Bytes* part : {&codes, &zero}) {
            for (std::uint8_t& byte : *part) byte = static_cast<std::uint8_t>(random_bits() >> 24) & (coding == 9 ? 0xF7 : 0xFF);
        }
        const auto code_at = [&](const Bytes& string, std::int64_t i) {
            int code = 0;
            for (std::int64_t bit = i * bits; bit < (i + 1) * bits; ++bit) code = code << 1 | (string[bit / 8] >> (7 - bit % 8) & 1);
            return code;
        };
        Floats dense(n);
        for (std::int64_t i = 0; i < n; ++i) {
            const int code = code_at(codes, i);
            const float value = coding == 8   ? static_cast<std::int8_t>(code)
                                : coding == 9 ? to_float(Float8{static_cast<std::uint8_t>(code)})
                                              : tables.values[code] - static_cast<float>(code_at(zero, i / size));
            dense[i] = value * scale[i / size];
        }
        const std::uint8_t* const zeros = coding < 8 ? zero.data() : nullptr;
        for (bool ordered : {false, true}) {
            Floats out(n);
            lownibble_dequantize_grouped(codes.data(), coding, tables.values.data(), scale.data(), nullptr, nullptr, nullptr, 0, zeros,
                                         ordered ? order.data() : nullptr, N, K, size, 0, out.data(), kThreads);
            for (std::int64_t i = 0; i < n; ++i) {
                if (out[ordered ? i / K * K + order[i % K] : i] != dense[i]) return false;
            }
        }
        for (int product : {0, 1, 2}) {  // gemv, x W^T, x W
            if (product && (K % 64 || !lownibble_has_matmul())) break;
            const std::int64_t terms = product == 2 ? N : K, columns = product == 2 ? K : N;
            Floats out(T * columns);
            const Floats rows(x.begin(), x.begin() + T * terms);
            const bool failed =
                product ? lownibble_matmul_grouped(rows.data(), T, codes.data(), coding, tables.values.data(), scale.data(), nullptr,
                                                   nullptr, nullptr, 0, zeros, N, K, size, product == 2, nullptr, nullptr, nullptr,
                                                   0, 0, 0, 1.0f, out.data(), kThreads)
                        : lownibble_gemv_grouped(rows.data(), 0, T, codes.data(), coding, tables.values.data(), scale.data(), nullptr,
                                                 nullptr, nullptr, 0, zeros, N, K, size, out.data(), kThreads);
            if (failed) return false;
            for (std::int64_t t = 0; t < T; ++t) {
                for (std::int64_t c = 0; c < columns; ++c) {
                    double sum = 0.0, magnitudes = 0.0;
                    for (std::int64_t k = 0; k < terms; ++k) {
                        const double term = static_cast<double>(rows[t * terms + k]) * dense[product == 2 ? k * K + c : c * K + k];
                        sum += term;
                        magnitudes += std::fabs(term);
                    }
                    if (std::fabs(out[t * columns + c] - sum) > (terms + 1) * std::ldexp(magnitudes, -24)) return false;
                }
            }
        }
    }
    return true;
}

// The same in 8 bits; this is about memory, the values are held to the reference elsewhere.
bool products_8bit_hold(std::int64_t T, std::int64_t N, std::int64_t K, std::int32_t block_shift, const Tables& tables) {
    Bytes codes(N * K / 2);
    for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(random_bits() >> 24);
    const Floats absmax(divided_up(N * K, block_shift), 0.5f);
    Floats dense(N * K), row_scale(N);
    for (std::int64_t i = 0; i < N * K; ++i) dense[i] = tables.values[i & 1 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * 0.5f;
    lownibble_row_scales(codes.data(), tables.values.data(), absmax.data(), nullptr, nullptr, nullptr, N, K, block_shift, 0,
                         row_scale.data(), kThreads);
    for (bool transposed : {false, true}) {
        const std::int64_t terms = transposed ? N : K, columns = transposed ? K : N;
        const std::int64_t padded = (T + 11) / 12 * 12, parts = (terms + 63) / 64;
        Floats x(T * terms), out(T * columns), scale(padded * parts), low(T), factor(columns);
        for (Floats* values : {&x, &low, &factor}) {
            for (float& value : *values) value = static_cast<float>(random_bits() >> 8) / 8388608.0f - 1.0f;
        }
        std::vector<std::int8_t> x_codes(padded * ((terms + 3) / 4 * 4));
        std::vector<std::int32_t> start(padded * parts);
        lownibble_quantize_rows(x.data(), transposed ? row_scale.data() : nullptr, T, terms, x_codes.data(), scale.data(),
                                start.data(), kThreads);
        if (lownibble_matmul_int8(x_codes.data(), scale.data(), start.data(), T, codes.data(), tables.values.data(),
                                  absmax.data(), nullptr, nullptr, nullptr, N, K, block_shift, 0, transposed, row_scale.data(),
                                  nullptr, low.data(), factor.data(), 1, columns, 1, 1.0f, out.data(), kThreads)) {
            return false;
        }
        Floats plain(T * columns);
        if (lownibble_matmul_int8_dense(x_codes.data(), scale.data(), start.data(), T, dense.data(), N, K, transposed,
                                        row_scale.data(), plain.data(), kThreads)) {
            return false;
        }
        for (std::int64_t t = 0; t < T; ++t) {
            for (std::int64_t c = 0; c < columns; ++c) {
                double sum = 0.0;
                for (std::int64_t k = 0; k < terms; ++k) {
                    sum += static_cast<double>(x[t * terms + k]) * dense[transposed ? k * K + c : c * K + k];
                }
                const double bound = 0.005 * terms;  // half a step of each factor of a term
                if (std::fabs(plain[t * columns + c] - sum) > bound) return false;
                if (std::fabs(out[t * columns + c] - sum - static_cast<double>(low[t]) * factor[c]) > bound) return false;
            }
        }
    }
    return true;
}

// What a decoder layer and a product with a bfloat16 weight leave behind; odd sizes, buffers of their exact lengths.
Floats decode(std::int64_t T, std::int64_t D, std::int64_t inner, std::int32_t block_shift, const Tables& tables) {
    random_state = 7;
    const std::int64_t heads = 3, key_heads = 1, hidden = 2 * D, capacity = T + 2, n_slots = 2;
    const std::int64_t q = heads * D, kv = key_heads * D;
    const std::int64_t shapes[kProjections][2] = {{q, hidden},     {kv, hidden},    {kv, hidden},   {hidden, q},
                                                  {inner, hidden}, {inner, hidden}, {hidden, inner}};
    const auto floats = [](std::int64_t n) {
        Floats made(n);
        for (float& value : made) value = static_cast<float>(random_bits() >> 8) / 16777216.0f - 0.5f;
        return made;
    };
    DecoderLayer layer{};
    std::vector<Bytes> codes;
    std::vector<Floats> kept;
    LowRank branches[kProjections] = {};
    std::vector<std::vector<std::uint16_t>> halves;
    kept.reserve(8 * kProjections);
    codes.reserve(kProjections);
    std::int64_t r = 0;
    for (int p = 0; p < kProjections; ++p) {
        const std::int64_t N = shapes[p][0], K = shapes[p][1];
        codes.emplace_back((N * K + 1) / 2);
        for (std::uint8_t& code : codes.back()) code = static_cast<std::uint8_t>(random_bits() >> 24);
        kept.push_back(floats(divided_up(N * K, block_shift)));
        const float* absmax = kept.back().data();
        kept.push_back(floats(N));
        layer.projections[p] = {codes.back().data(), tables.values.data(), absmax, nullptr, nullptr, nullptr, kept.back().data(),
                                N, K, block_shift, 0};
        if (p == kK) continue;  // a projection without a branch
        r = p + 1;
        const DType dtype = static_cast<DType>(p % 3);  // every type that a branch may have, in memory of its exact size
        const void* factors[2];
        for (int i = 0; i < 2; ++i) {
            const std::int64_t n = r * (i ? N : K);
            if (dtype == DType::float32) {
                kept.push_back(floats(n));
                factors[i] = kept.back().data();
            } else {
                halves.emplace_back(n);
                for (std::uint16_t& bits : halves.back()) bits = static_cast<std::uint16_t>(0x3C00 + (random_bits() >> 26));
                factors[i] = halves.back().data();
            }
        }
        if (p % 2) kept.push_back(floats(N));
        branches[p] = {factors[0], factors[1], p % 2 ? kept.back().data() : nullptr, r, 0.5f, dtype};
    }
    const Floats norm = floats(hidden), head_norm = floats(D), cosine = floats(2 * T * D), sine = floats(2 * T * D);
    layer.input_norm = layer.feed_forward_norm = norm.data();
    layer.attention_output_norm = layer.feed_forward_output_norm = norm.data();
    layer.q_norm = layer.k_norm = head_norm.data();
    layer.hidden = hidden, layer.heads = heads, layer.key_heads = key_heads, layer.head_dim = D;
    layer.eps = 1e-5f, layer.scaling = 0.3f, layer.softcap = 2.0f, layer.residual_scale = 0.5f;
    layer.window = T / 2, layer.rope = 1, layer.context = 1, layer.activation = Activation::gelu_tanh;
    Floats x = floats(T * hidden), keys = floats(n_slots * kv * capacity), values = floats(n_slots * kv * capacity);
    std::vector<std::int64_t> slots(T, 1), places(2 * T, -1);
    for (std::int64_t t = 0; t < T; ++t) places[T + t] = t + 1;
    const Segment segment{T / 3, T, branches};
    const Context contexts[2] = {{nullptr, nullptr, 1}, {keys.data(), values.data(), capacity}};
    const Tokens tokens{x.data(), T,        cosine.data(), sine.data(),   contexts,
                        n_slots,  capacity, slots.data(),  places.data(), &segment, 1};
    Floats workspace(lownibble_decoder_workspace(&layer, T, r, capacity, kThreads));
    if (lownibble_decoder_layers(&layer, 1, &tokens, r, workspace.data(), kThreads)) std::abort();
    for (const Floats* more : {&keys, &values}) x.insert(x.end(), more->begin(), more->end());
    std::vector<std::uint16_t> half(inner * hidden);
    for (std::uint16_t& bits : half) bits = static_cast<std::uint16_t>(0x3F80 + (random_bits() >> 26));
    Floats product(T * inner), input = floats(T * hidden);
    lownibble_gemv_bf16(input.data(), T, hidden, half.data(), product.data(), inner, kThreads);
    x.insert(x.end(), product.begin(), product.end());
    return x;
}

// low = x A^T and its gradients against the formulas in float64; buffers of their exact lengths.
bool low_rank_holds(std::int64_t T, std::int64_t N, std::int64_t K, std::int64_t r) {
    const auto floats = [](std::int64_t n) {
        Floats made(n);
        for (float& value : made) value = static_cast<float>(random_bits() >> 8) / 16777216.0f - 0.5f;
        return made;
    };
    const Floats x = floats(T * K), dy = floats(T * N), a = floats(r * K), b = floats(N * r);
    Floats low(T * r), dlow(T * r), db(N * r), da(r * K);
    const std::int64_t n_sums = lownibble_low_rank_sums(T, N, K, r);
    float* const sums = static_cast<float*>(std::aligned_alloc(64, n_sums * 4));
    const bool failed = lownibble_low_rank(x.data(), T, K, a.data(), r, 1, K, 1.0f, low.data(), kThreads) ||
                        lownibble_low_rank_backward(dy.data(), x.data(), low.data(), T, N, K, b.data(), r, r, 1, 0.5f, dlow.data(),
                                                    db.data(), da.data(), sums, kThreads);
    std::free(sums);
    if (failed) return false;
    const auto close = [](float found, double expected, std::int64_t terms) {  // `terms` of a sum, and of the sums that are its terms
        const double magnitudes = 0.25 * terms * (1 + 0.25 * terms);
        return std::fabs(found - expected) <= (terms + 3) * std::ldexp(magnitudes, -24);
    };
    for (std::int64_t i = 0; i < r; ++i) {
        for (std::int64_t t = 0; t < T; ++t) {
            double forward = 0, backward = 0;
            for (std::int64_t k = 0; k < K; ++k) forward += static_cast<double>(x[t * K + k]) * a[i * K + k];
            for (std::int64_t n = 0; n < N; ++n) backward += static_cast<double>(dy[t * N + n]) * b[n * r + i];
            if (!close(low[t * r + i], forward, K) || !close(dlow[t * r + i], 0.5 * backward, N)) return false;
        }
        for (std::int64_t n = 0; n < N; ++n) {
            double sum = 0;
            for (std::int64_t t = 0; t < T; ++t) sum += 0.5 * dy[t * N + n] * low[t * r + i];
            if (!close(db[n * r + i], sum, T + K)) return false;
        }
        for (std::int64_t k = 0; k < K; ++k) {
            double sum = 0;
            for (std::int64_t t = 0; t < T; ++t) sum += static_cast<double>(dlow[t * r + i]) * x[t * K + k];
            if (!close(da[i * K + k], sum, T + N)) return false;
        }
    }
    return true;
}

// Attention of 4 heads over 2 pairs of keys and values in one row of three segments, against sums in double precision; backward is
// compared with finite differences of the sum of the output times `dout`, for a few elements. Buffers have their exact sizes.
bool attention_holds(std::int64_t T, std::int64_t D) {
    const std::int64_t heads = 4, key_heads = 2, borders[] = {0, T / 3, T / 3 + 1, T};
    const float scaling = 0.2f;
    Floats q(T * heads * D), k(T * key_heads * D), v(T * key_heads * D), out(T * heads * D), dout(T * heads * D), lse(T * heads);
    for (Floats* values : {&q, &k, &v, &dout}) {
        for (float& value : *values) value = static_cast<float>(random_bits() >> 8) / 8388608.0f - 1.0f;
    }
    const std::int64_t wide[3] = {T * heads * D, heads * D, D}, narrow[3] = {T * key_heads * D, key_heads * D, D};
    std::vector<std::int64_t> strides, more;
    for (const auto* one : {wide, narrow, narrow, wide}) strides.insert(strides.end(), one, one + 3);
    for (const auto* one : {wide, wide, narrow, narrow, wide, wide, narrow, narrow}) more.insert(more.end(), one, one + 3);
    if (lownibble_attention(q.data(), k.data(), v.data(), out.data(), strides.data(), lse.data(), borders, 3, T, heads, key_heads, D,
                            scaling, kThreads)) {
        return false;
    }
    const auto total = [&](std::vector<double>* result) {  // the sum of output times dout, in double precision
        double sum = 0;
        for (int segment = 0; segment < 3; ++segment) {
            for (std::int64_t t = borders[segment]; t < borders[segment + 1]; ++t) {
                for (std::int64_t h = 0; h < heads; ++h) {
                    std::vector<double> weights;
                    double all = 0;
                    for (std::int64_t u = borders[segment]; u <= t; ++u) {
                        double score = 0;
                        for (std::int64_t d = 0; d < D; ++d) {
                            score += static_cast<double>(q[(t * heads + h) * D + d]) * k[(u * key_heads + h / 2) * D + d];
                        }
                        weights.push_back(std::exp(score * scaling));
                        all += weights.back();
                    }
                    for (std::int64_t d = 0; d < D; ++d) {
                        double value = 0;
                        for (std::size_t u = 0; u < weights.size(); ++u) {
                            value += weights[u] / all * v[((borders[segment] + u) * key_heads + h / 2) * D + d];
                        }
                        if (result) result->push_back(value);
                        sum += value * dout[(t * heads + h) * D + d];
                    }
                }
            }
        }
        return sum;
    };
    std::vector<double> expected;
    total(&expected);
    for (std::size_t i = 0; i < expected.size(); ++i) {
        if (std::fabs(out[i] - expected[i]) > 1e-5) return false;
    }
    Floats dq(q.size()), dk(k.size()), dv(v.size());
    if (lownibble_attention_backward(dout.data(), q.data(), k.data(), v.data(), out.data(), dq.data(), dk.data(), dv.data(),
                                     more.data(), lse.data(), borders, 3, T, heads, key_heads, D, scaling, kThreads)) {
        return false;
    }
    const struct {
        Floats *input, *gradient;
    } pairs[] = {{&q, &dq}, {&k, &dk}, {&v, &dv}};
    for (const auto& pair : pairs) {
        for (int i = 0; i < 4; ++i) {
            const std::size_t at = random_bits() % pair.input->size();
            const float kept = (*pair.input)[at];
            (*pair.input)[at] = kept + 0.0078125f;
            const double above = total(nullptr);
            (*pair.input)[at] = kept - 0.0078125f;
            const double below = total(nullptr);
            (*pair.input)[at] = kept;
            if (std::fabs((above - below) / 0.015625 - (*pair.gradient)[at]) > 1e-3) return false;
        }
    }
    return true;
}

bool decoder_holds(const std::string& name, std::int64_t T, std::int64_t D, std::int64_t inner, std::int32_t block_shift,
                   const Tables& tables) {
    if (lownibble_select("scalar")) std::abort();
    const Floats scalar = decode(T, D, inner, block_shift, tables);
    if (lownibble_select(name.c_str())) std::abort();
    const Floats other = decode(T, D, inner, block_shift, tables);
    for (std::size_t i = 0; i < scalar.size(); ++i) {
        if (!(std::fabs(scalar[i] - other[i]) <= 1e-3f + 1e-3f * std::fabs(scalar[i]))) return false;
    }
    return true;
}

std::vector<std::string> available() {
    std::vector<std::string> names(1);
    for (const char* p = lownibble_available(); *p; ++p) {
        if (*p == ',') {
            names.emplace_back();
        } else {
            names.back() += *p;
        }
    }
    return names;
}

}  // namespace

int main() {
    const Tables tables = make_tables();
    const std::int64_t shapes[][2] = {{0, 0},   {1, 1},   {1, 17}, {3, 5},    {7, 64},
                                      {5, 100}, {9, 333}, {6, 48}, {3, 4100}, {130, 576}};
    for (const std::string& name : available()) {
        int cases = 0;
        for (const auto& shape : shapes) {
            for (std::int32_t block_shift : {4, 6, 7, 12}) {
                for (std::int32_t dtype : {0, 1, 2}) {
                    const Case c{shape[0], shape[1], block_shift, dtype, 1 + cases % 7};
                    Floats weights(c.N * c.K), inputs(c.T * c.K);
                    for (float& value : weights) value = random_float();
                    for (float& value : inputs) value = random_float();
                    const Bytes weight_bytes = encode_as(dtype, weights), x = encode_as(dtype, inputs);
                    if (lownibble_select("scalar")) std::abort();
                    const Results scalar = compute(c, tables, weight_bytes, x);
                    if (lownibble_select(name.c_str())) std::abort();
                    const Results other = compute(c, tables, weight_bytes, x);
                    if (const char* what = difference(c, tables, x, scalar, other)) {
                        std::printf("%s: %s differs from scalar, N=%lld K=%lld block=%d dtype=%d T=%lld\n", name.c_str(),
                                    what, static_cast<long long>(c.N), static_cast<long long>(c.K), 1 << block_shift, dtype,
                                    static_cast<long long>(c.T));
                        return 1;
                    }
                    ++cases;
                }
            }
        }
        std::printf("%s: %d cases equal scalar\n", name.c_str(), cases);
        const std::int64_t decoders[][4] = {{1, 10, 37, 5}, {3, 32, 192, 6}, {9, 64, 130, 6}, {11, 18, 64, 4}, {2, 96, 65, 7}};
        for (const auto& shape : decoders) {
            if (!decoder_holds(name, shape[0], shape[1], shape[2], static_cast<std::int32_t>(shape[3]), tables)) {
                std::printf("%s: the decoder layer differs from scalar, T=%lld head_dim=%lld\n", name.c_str(),
                            static_cast<long long>(shape[0]), static_cast<long long>(shape[1]));
                return 1;
            }
        }
        const std::int64_t branches[][4] = {{1, 3, 5, 1}, {77, 100, 130, 7}, {300, 48, 33, 16}, {65, 192, 64, 40}};
        for (const auto& shape : branches) {
            if (lownibble_has_low_rank() && !low_rank_holds(shape[0], shape[1], shape[2], shape[3])) {
                std::printf("%s: the low-rank branch is wrong, T=%lld N=%lld K=%lld r=%lld\n", name.c_str(),
                            static_cast<long long>(shape[0]), static_cast<long long>(shape[1]), static_cast<long long>(shape[2]),
                            static_cast<long long>(shape[3]));
                return 1;
            }
        }
        for (const auto& [T, D] : {std::pair<std::int64_t, std::int64_t>{1, 16}, {7, 48}, {40, 64}, {130, 16}}) {
            if (lownibble_has_attention() && !attention_holds(T, D)) {
                std::printf("%s: attention is wrong, T=%lld D=%lld\n", name.c_str(), static_cast<long long>(T),
                            static_cast<long long>(D));
                return 1;
            }
        }
        const std::int64_t products[][3] = {{1, 1, 64}, {7, 33, 64}, {8, 48, 192}, {17, 97, 704}, {21, 650, 64}, {13, 2075, 64}, {13, 33, 2112}};
        for (const auto& shape : products) {
            for (std::int32_t block_shift : {5, 6, 12}) {
                if (lownibble_has_int8() && !products_8bit_hold(shape[0], shape[1], shape[2], block_shift, tables)) {
                    std::printf("%s: matmul_int8 is wrong, T=%lld N=%lld K=%lld block=%d\n", name.c_str(),
                                static_cast<long long>(shape[0]), static_cast<long long>(shape[1]),
                                static_cast<long long>(shape[2]), 1 << block_shift);
                    return 1;
                }
                if (lownibble_has_matmul() && !products_hold(shape[0], shape[1], shape[2], block_shift, tables)) {
                    std::printf("%s: matmul_4bit is wrong, T=%lld N=%lld K=%lld block=%d\n", name.c_str(),
                                static_cast<long long>(shape[0]), static_cast<long long>(shape[1]),
                                static_cast<long long>(shape[2]), 1 << block_shift);
                    return 1;
                }
            }
        }
    }
    for (const std::string& name : available()) {
        if (lownibble_select(name.c_str())) std::abort();
        for (const auto& shape : {std::array<std::int64_t, 4>{3, 5, 64, 32}, {2, 2, 24, 24}, {9, 7, 128, 64}, {5, 130, 192, 192}}) {
            if (!grouped_holds(shape[0], shape[1], shape[2], shape[3], tables)) {
                std::printf("%s: grouped weights are wrong, N=%lld K=%lld group=%lld\n", name.c_str(),
                            static_cast<long long>(shape[1]), static_cast<long long>(shape[2]), static_cast<long long>(shape[3]));
                return 1;
            }
        }
    }
    return 0;
}
