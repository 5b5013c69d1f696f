// The exported C functions: choice of the instruction set, and threads.
//
// Threads. OpenMP, with the caller's thread count. torch bundles its own libgomp under the same SONAME, so when torch is
// imported first the loader gives this library the same runtime and the same thread pool: no second pool that competes for the
// cores. A call uses one thread or all of them: libgomp rebuilds its team when the size changes, which costs more than it
// gains. Small calls stay on the calling thread. Shares are whole blocks, rows or panels, so results do not depend on the number
// of threads.
//
// Lengths and types are checked by the caller (kernels/cpu/arguments.py).
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "attention.h"
#include "decoder.h"
#include "int8.h"
#include "kernels.h"
#include "low_rank.h"
#include "matmul.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

using namespace lownibble;

#define LOWNIBBLE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr std::int64_t kSerialElements = 1 << 16;  // about 5 microseconds of work, a few times the cost of a fork

#if defined(__x86_64__)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}
bool has_vnni() { return __builtin_cpu_supports("avx512vnni"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
#endif

// What this machine runs, fastest first, ended by null.
struct Available {
    const Kernels* kernels[4] = {};
    char names[64] = {};

    Available() {
        int count = 0;
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (has_avx512()) kernels[count++] = &kAvx512Kernels;
        if (has_avx2()) kernels[count++] = &kAvx2Kernels;
#elif defined(__aarch64__)
        kernels[count++] = &kNeonKernels;
#endif
        kernels[count++] = &kScalarKernels;
        for (int i = 0; i < count; ++i) {
            if (i) std::strcat(names, ",");
            std::strcat(names, kernels[i]->name);
        }
    }
};

const Available& available() {
    static const Available instance;
    return instance;
}

const Kernels* active = available().kernels[0];

// The 8-bit products that go with the instruction set in use, or null.
const Int8Kernels* active_int8() {
#if defined(__x86_64__)
    if (active == &kAvx512Kernels && has_vnni()) return &kAvx512VnniInt8Kernels;
#endif
    return nullptr;
}

// The exact products that go with the instruction set in use, or null.
const MatmulKernels* active_matmul() {
#if defined(__x86_64__)
    if (active == &kAvx512Kernels) return &kAvx512MatmulKernels;
#endif
    return nullptr;
}

// The low-rank branch's products that go with the instruction set in use, or null.
const LowRankKernels* active_low_rank() {
#if defined(__x86_64__)
    if (active == &kAvx512Kernels) return &kAvx512LowRankKernels;
#endif
    return nullptr;
}

// The attention that goes with the instruction set in use, or null.
const AttentionKernels* active_attention() {
#if defined(__x86_64__)
    if (active == &kAvx512Kernels) return &kAvx512AttentionKernels;
#endif
    return nullptr;
}

// A thread's buffer for panels, aligned to 64 bytes, reused between calls (a fresh allocation would page-fault); about half a
// megabyte for exact products.
struct Scratch {
    void* memory = nullptr;
    std::size_t size = 0;

    // At least `bytes`, or null when there is no memory.
    void* of(std::size_t bytes) {
        if (bytes > size) {
            std::free(memory);
            memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
            size = memory ? bytes : 0;
        }
        return memory;
    }
    ~Scratch() { std::free(memory); }
};
thread_local Scratch scratch;

// Split `count` items of `elements` elements in all over the threads, in contiguous ranges.
template <class Body>
void in_parallel(std::int64_t count, std::int64_t elements, std::int32_t num_threads, Body body) {
    if (num_threads < 2 || elements < kSerialElements || count < 2) {
        if (count) body(Range{0, count});
        return;
    }
    const std::int64_t parts = num_threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
#endif
    for (std::int64_t part = 0; part < parts; ++part) {
        const Range range{count * part / parts, count * (part + 1) / parts};
        if (range.begin < range.end) body(range);
    }
}

// Dynamic schedule: `count` items of `elements` elements in all, each run by the next free thread. For long items, since threads
// of a shared machine are seldom equally fast. An item's result must not depend on the thread that runs it.
template <class Body>
void in_turns(std::int64_t count, std::int64_t elements, std::int32_t num_threads, Body body) {
    if (num_threads < 2 || elements < kSerialElements || count < 2) {
        for (std::int64_t item = 0; item < count; ++item) body(item);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
#endif
    for (std::int64_t item = 0; item < count; ++item) body(item);
}

// Split the panels of an exact product among the threads: `body(memory, panels, rows)`; -1 when there is no memory for a group of
// panels. If there are fewer groups than threads, rows are split too.
template <class Body>
std::int32_t share_panels(std::int64_t T, std::int64_t N, std::int64_t K, std::int64_t columns, std::int64_t r,
                          std::int32_t num_threads, Body body) {
    const std::int64_t panels = (columns + kMatmulPanel - 1) / kMatmulPanel;
    // Equally many groups per thread, whose sizes differ by at most one panel.
    const std::int64_t wanted = (panels + kMatmulGroup - 1) / kMatmulGroup;
    const std::int64_t groups = smaller(panels, (wanted + num_threads - 1) / num_threads * num_threads);
    const std::int64_t shares = groups && groups < num_threads ? smaller(T, num_threads / groups) : smaller(T, 1);
    std::int32_t failed = 0;
    in_turns(groups * shares, T * N * K, num_threads, [&](std::int64_t item) {
        void* memory = scratch.of(static_cast<std::size_t>(matmul_scratch(r)));
        if (!memory) {
            failed = -1;
            return;
        }
        const std::int64_t i = item / shares, j = item % shares;
        body(memory, Range{panels * i / groups, panels * (i + 1) / groups}, Range{T * j / shares, T * (j + 1) / shares});
    });
    return failed;
}

// A tensor of (tokens of a row, heads, head_dim) for each row, whose last dimension is contiguous.
struct Heads {
    float* data;
    const std::int64_t* strides;  // row, token, head

    // One head from token `n` on; rows are `row_tokens` tokens long.
    HeadRows at(std::int64_t n, std::int64_t head, std::int64_t row_tokens) const {
        return {data + n / row_tokens * strides[0] + n % row_tokens * strides[1] + head * strides[2], strides[1]};
    }
};

Heads heads_of(const float* data, const std::int64_t* strides) { return {const_cast<float*>(data), strides}; }

std::int64_t blocks_of(std::int64_t n, std::int32_t block_shift) {
    return (n + (std::int64_t{1} << block_shift) - 1) >> block_shift;
}

// Call body with x, n elements, in float32; -1 when there is no memory for that.
template <class Body>
std::int32_t with_float32(const void* x, DType dtype, std::int64_t n, Body body) {
    float* converted = nullptr;
    if (dtype != DType::float32 && n > 0) {
        converted = static_cast<float*>(std::malloc(static_cast<std::size_t>(n) * sizeof(float)));
        if (!converted) return -1;
        active->to_float32(dtype, x, n, converted);
    }
    body(converted ? converted : static_cast<const float*>(x));
    std::free(converted);
    return 0;
}

}  // namespace

// Incremented whenever a signature below changes; kernels/cpu/loading.py rejects another number.
LOWNIBBLE_EXPORT std::int32_t lownibble_abi() { return 13; }

// Comma-separated names of the instruction sets that run here, fastest first.
LOWNIBBLE_EXPORT const char* lownibble_available() { return available().names; }

LOWNIBBLE_EXPORT const char* lownibble_isa() { return active->name; }

// Use the instruction set called `name` from now on. 0, or -1 when it cannot run here.
LOWNIBBLE_EXPORT std::int32_t lownibble_select(const char* name) {
    for (const Kernels* kernels : available().kernels) {
        if (kernels && std::strcmp(kernels->name, name) == 0) {
            active = kernels;
            return 0;
        }
    }
    return -1;
}

LOWNIBBLE_EXPORT void lownibble_dequantize_4bit(const std::uint8_t* codes, const float* values, const void* absmax,
                                                const float* nested_values, const float* nested_absmax,
                                                const float* nested_offset, std::int64_t n, std::int32_t block_shift,
                                                std::int32_t nested_shift, std::int32_t out_dtype, void* out,
                                                std::int32_t num_threads) {
    const Weight4bit w{codes, values, absmax, nested_values, nested_absmax, nested_offset, n, block_shift, nested_shift};
    in_parallel(blocks_of(n, block_shift), n, num_threads,
                [&](Range blocks) { active->dequantize_4bit(w, static_cast<DType>(out_dtype), out, blocks); });
}

LOWNIBBLE_EXPORT void lownibble_quantize_4bit(const void* x, std::int32_t x_dtype, std::int64_t n, std::int32_t block_shift,
                                              const float* bounds, const std::uint8_t* order, std::uint8_t* codes,
                                              float* absmax, std::int32_t num_threads) {
    const Encoder4bit encoder{bounds, order};
    in_parallel(blocks_of(n, block_shift), n, num_threads, [&](Range blocks) {
        active->quantize_4bit(static_cast<DType>(x_dtype), x, n, block_shift, encoder, codes, absmax, blocks);
    });
}

// The 4-bit codes of decode(w) + low A for a w (N, K) of int8 codes with a scale a group, which divides K, low (N, r) and A (r, K).
// A tile of whole rows and whole 4-bit blocks at a time, so that neither the sum nor w is ever there as a whole; a value does not
// depend on its tile. 0, or -1 when there is no memory for a tile a thread.
LOWNIBBLE_EXPORT std::int32_t lownibble_quantize_sum_4bit(const std::int8_t* w, const float* scale, std::int64_t group,
                                                          const float* low, const float* a, std::int64_t N, std::int64_t K,
                                                          std::int64_t r, std::int32_t block_shift, const float* bounds,
                                                          const std::uint8_t* order, std::uint8_t* codes, float* absmax,
                                                          std::int32_t num_threads) {
    constexpr std::int64_t kTileElements = 1 << 14;  // 64 KiB: half of a second-level cache of 128
    const Encoder4bit encoder{bounds, order};
    std::int64_t unit = std::int64_t{1} << block_shift;  // rows after which rows and blocks begin together
    while (unit > 1 && (unit / 2) * K % (std::int64_t{1} << block_shift) == 0) unit /= 2;
    const std::int64_t wanted = kTileElements / (unit * K);
    const std::int64_t rows = unit * (wanted > 1 ? wanted : 1), tiles = (N + rows - 1) / rows;
    std::atomic<std::int32_t> failed{0};
    in_parallel(tiles, N * K, num_threads, [&](Range range) {
        float* const tile = static_cast<float*>(std::malloc(static_cast<std::size_t>(rows * K) * sizeof(float)));
        if (!tile) {
            failed = -1;
            return;
        }
        for (std::int64_t t = range.begin; t < range.end; ++t) {
            const std::int64_t row = t * rows, count = smaller(rows, N - row), first = row * K;
            active->dequantize_int8(w + first, scale + first / group, group, count * K, tile);
            active->add_low_rank(low + row * r, r, count, r, DType::float32, a, tile, K, Range{0, K});
            active->quantize_4bit(DType::float32, tile, count * K, block_shift, encoder, codes + first / 2,
                                  absmax + (first >> block_shift), Range{0, blocks_of(count * K, block_shift)});
        }
        std::free(tile);
    });
    return failed;
}

LOWNIBBLE_EXPORT void lownibble_quantize_8bit(const float* x, std::int64_t n, std::int32_t block_shift,
                                              const std::uint8_t* lookup, std::uint8_t* codes, float* absmax,
                                              std::int32_t num_threads) {
    in_parallel(blocks_of(n, block_shift), n, num_threads,
                [&](Range blocks) { active->quantize_8bit(x, n, block_shift, lookup, codes, absmax, blocks); });
}

LOWNIBBLE_EXPORT void lownibble_dequantize_8bit(const std::uint8_t* codes, const float* absmax, const float* values,
                                                std::int64_t n, std::int32_t block_shift, float* out,
                                                std::int32_t num_threads) {
    in_parallel(blocks_of(n, block_shift), n, num_threads,
                [&](Range blocks) { active->dequantize_8bit(codes, absmax, values, n, block_shift, out, blocks); });
}

// 0, or -1 when there is no memory for x in float32.
LOWNIBBLE_EXPORT std::int32_t lownibble_gemv_4bit(const void* x, std::int32_t x_dtype, std::int64_t T, std::int64_t K,
                                                  const std::uint8_t* codes, const float* values, const void* absmax,
                                                  const float* nested_values, const float* nested_absmax,
                                                  const float* nested_offset, std::int64_t N, std::int32_t block_shift,
                                                  std::int32_t nested_shift, void* out, std::int32_t num_threads) {
    const Weight4bit w{codes, values, absmax, nested_values, nested_absmax, nested_offset, N * K, block_shift, nested_shift};
    const DType dtype = static_cast<DType>(x_dtype);
    return with_float32(x, dtype, T * K, [&](const float* x_32) {
        in_parallel(T ? N : 0, N * K, num_threads, [&](Range rows) { active->gemv_4bit(x_32, T, K, w, dtype, out, N, rows); });
    });
}

LOWNIBBLE_EXPORT void lownibble_dequantize_grouped(
    const std::uint8_t* codes, std::int32_t coding, const float* values, const void* scale, const float* nested_values,
    const float* nested_absmax, const float* nested_offset, std::int32_t nested_shift, const std::uint8_t* zero,
    const std::int32_t* order, std::int64_t N, std::int64_t K, std::int64_t group_size, std::int32_t out_dtype, void* out,
    std::int32_t num_threads) {
    const WeightGrouped w{codes, values, scale, nested_values, nested_absmax, nested_offset, zero, order, N, K, group_size,
                          nested_shift, static_cast<Coding>(coding)};
    in_parallel(N, N * K, num_threads,
                [&](Range rows) { active->dequantize_grouped(w, static_cast<DType>(out_dtype), out, rows); });
}

// 0, or -1 when there is no memory for x in float32.
LOWNIBBLE_EXPORT std::int32_t lownibble_gemv_grouped(const void* x, std::int32_t x_dtype, std::int64_t T,
                                                     const std::uint8_t* codes, std::int32_t coding, const float* values,
                                                     const void* scale, const float* nested_values, const float* nested_absmax,
                                                     const float* nested_offset, std::int32_t nested_shift,
                                                     const std::uint8_t* zero, std::int64_t N, std::int64_t K,
                                                     std::int64_t group_size, void* out, std::int32_t num_threads) {
    const WeightGrouped w{codes, values, scale, nested_values, nested_absmax, nested_offset, zero, nullptr, N, K, group_size,
                          nested_shift, static_cast<Coding>(coding)};
    const DType dtype = static_cast<DType>(x_dtype);
    return with_float32(x, dtype, T * K, [&](const float* x_32) {
        in_parallel(T ? N : 0, N * K, num_threads, [&](Range rows) { active->gemv_grouped(x_32, T, w, dtype, out, rows); });
    });
}

// 1 when the functions below may be called with the instruction set in use.
LOWNIBBLE_EXPORT std::int32_t lownibble_has_int8() { return active_int8() != nullptr; }

LOWNIBBLE_EXPORT void lownibble_row_scales(const std::uint8_t* codes, const float* values, const void* absmax,
                                           const float* nested_values, const float* nested_absmax,
                                           const float* nested_offset, std::int64_t N, std::int64_t K,
                                           std::int32_t block_shift, std::int32_t nested_shift, float* scale,
                                           std::int32_t num_threads) {
    const Weight4bit w{codes, values, absmax, nested_values, nested_absmax, nested_offset, N * K, block_shift, nested_shift};
    in_parallel(N, (N * K) >> block_shift, num_threads, [&](Range rows) { active_int8()->row_scales(w, K, scale, rows); });
}

LOWNIBBLE_EXPORT void lownibble_quantize_rows(const float* x, const float* column_scale, std::int64_t T, std::int64_t C,
                                              std::int8_t* codes, float* scale, std::int32_t* start,
                                              std::int32_t num_threads) {
    const Rows8bit rows{codes, scale, start, T, C};
    in_parallel((T + kRowTile - 1) / kRowTile, T * C, num_threads,
                [&](Range tiles) { active_int8()->quantize_rows(x, column_scale, rows, tiles); });
}

// 0, or -1 when there is no memory for a panel a thread.
LOWNIBBLE_EXPORT std::int32_t lownibble_matmul_int8(
    const std::int8_t* x_codes, const float* x_scale, const std::int32_t* x_start, std::int64_t T, const std::uint8_t* codes,
    const float* values, const void* absmax, const float* nested_values, const float* nested_absmax,
    const float* nested_offset, std::int64_t N, std::int64_t K, std::int32_t block_shift, std::int32_t nested_shift,
    std::int32_t transposed, const float* row_scale, const float* bias, const float* low, const float* factor,
    std::int64_t r, std::int64_t factor_step, std::int64_t factor_stride, float factor_scale, float* out,
    std::int32_t num_threads) {
    const Weight4bit w{codes, values, absmax, nested_values, nested_absmax, nested_offset, N * K, block_shift, nested_shift};
    const std::int64_t C = transposed ? N : K, columns = transposed ? K : N;
    const Rows8bit x{const_cast<std::int8_t*>(x_codes), const_cast<float*>(x_scale), const_cast<std::int32_t*>(x_start), T, C};
    const Addition addition{bias, low, factor, r, factor_step, factor_stride, factor_scale};
    const std::size_t bytes = static_cast<std::size_t>(int8_scratch(C, r));
    std::int32_t failed = 0;
    in_turns((columns + kPanel - 1) / kPanel, T * C * columns, num_threads, [&](std::int64_t panel) {
        void* memory = scratch.of(bytes);
        if (!memory) {
            failed = -1;
            return;
        }
        active_int8()->matmul(x, w, N, K, transposed != 0, row_scale, addition, out, memory, Range{panel, panel + 1});
    });
    return failed;
}

// 0, or -1 when there is no memory for panels a thread. Panels of a long sum go in groups, which read x once.
LOWNIBBLE_EXPORT std::int32_t lownibble_matmul_int8_dense(const std::int8_t* x_codes, const float* x_scale,
                                                          const std::int32_t* x_start, std::int64_t T, const float* w,
                                                          std::int64_t N, std::int64_t K, std::int32_t transposed,
                                                          const float* row_scale, float* out, std::int32_t num_threads) {
    const std::int64_t C = transposed ? N : K, columns = transposed ? K : N;
    const Rows8bit x{const_cast<std::int8_t*>(x_codes), const_cast<float*>(x_scale), const_cast<std::int32_t*>(x_start), T, C};
    const std::int64_t panels = (columns + kPanel - 1) / kPanel, at_once = C > kTerms ? kPanels : 1;
    std::int32_t failed = 0;
    in_turns((panels + at_once - 1) / at_once, T * C * columns, num_threads, [&](std::int64_t group) {
        const Range range{group * at_once, smaller((group + 1) * at_once, panels)};
        void* memory = scratch.of(static_cast<std::size_t>(at_once * int8_scratch(C, 0)));
        if (!memory) {
            failed = -1;
            return;
        }
        active_int8()->matmul_dense(x, w, N, K, transposed != 0, row_scale, out, memory, range);
    });
    return failed;
}

// 1 when lownibble_matmul_4bit may be called with the instruction set in use.
LOWNIBBLE_EXPORT std::int32_t lownibble_has_matmul() { return active_matmul() != nullptr; }

// 0, or -1 when there is no memory for a group of panels a thread.
LOWNIBBLE_EXPORT std::int32_t lownibble_matmul_4bit(
    const float* x, std::int64_t T, const std::uint8_t* codes, const float* values, const void* absmax,
    const float* nested_values, const float* nested_absmax, const float* nested_offset, std::int64_t N, std::int64_t K,
    std::int32_t block_shift, std::int32_t nested_shift, std::int32_t transposed, const float* bias, const float* low,
    const float* factor, std::int64_t r, std::int64_t factor_step, std::int64_t factor_stride, float factor_scale, float* out,
    std::int32_t num_threads) {
    const Weight4bit w{codes, values, absmax, nested_values, nested_absmax, nested_offset, N * K, block_shift, nested_shift};
    const Addition addition{bias, low, factor, r, factor_step, factor_stride, factor_scale};
    return share_panels(T, N, K, transposed ? K : N, r, num_threads, [&](void* memory, Range panels, Range rows) {
        active_matmul()->matmul_4bit(x, w, N, K, transposed != 0, addition, out, memory, panels, rows);
    });
}

// The same with a grouped W; a group is a multiple of 16 long.
LOWNIBBLE_EXPORT std::int32_t lownibble_matmul_grouped(
    const float* x, std::int64_t T, const std::uint8_t* codes, std::int32_t coding, const float* values, const void* scale,
    const float* nested_values, const float* nested_absmax, const float* nested_offset, std::int32_t nested_shift,
    const std::uint8_t* zero, std::int64_t N, std::int64_t K, std::int64_t group_size, std::int32_t transposed, const float* bias,
    const float* low, const float* factor, std::int64_t r, std::int64_t factor_step, std::int64_t factor_stride,
    float factor_scale, float* out, std::int32_t num_threads) {
    const WeightGrouped w{codes, values, scale, nested_values, nested_absmax, nested_offset, zero, nullptr, N, K, group_size,
                          nested_shift, static_cast<Coding>(coding)};
    const Addition addition{bias, low, factor, r, factor_step, factor_stride, factor_scale};
    return share_panels(T, N, K, transposed ? K : N, r, num_threads, [&](void* memory, Range panels, Range rows) {
        active_matmul()->matmul_grouped(x, w, transposed != 0, addition, out, memory, panels, rows);
    });
}

// The same with a dense float32 W (N, K), K a multiple of 64.
LOWNIBBLE_EXPORT std::int32_t lownibble_matmul_dense(
    const float* x, std::int64_t T, const float* w, std::int64_t N, std::int64_t K, std::int32_t transposed, const float* bias,
    const float* low, const float* factor, std::int64_t r, std::int64_t factor_step, std::int64_t factor_stride, float factor_scale,
    float* out, std::int32_t num_threads) {
    const Addition addition{bias, low, factor, r, factor_step, factor_stride, factor_scale};
    return share_panels(T, N, K, transposed ? K : N, r, num_threads, [&](void* memory, Range panels, Range rows) {
        active_matmul()->matmul_dense(x, w, N, K, transposed != 0, addition, out, memory, panels, rows);
    });
}

// out (P, Q) = a^T b, with a (T, P) and b (T, Q), or with `adds` more by it; Q a multiple of 64. 0, or -1 as above.
LOWNIBBLE_EXPORT std::int32_t lownibble_outer(const float* a, const float* b, std::int64_t T, std::int64_t P, std::int64_t Q,
                                              std::int32_t adds, float* out, std::int32_t num_threads) {
    return share_panels(P, T, Q, Q, 0, num_threads, [&](void* memory, Range panels, Range rows) {
        active_matmul()->outer(a, b, T, P, Q, adds != 0, out, memory, panels, rows);
    });
}

// 1 when the functions below may be called with the instruction set in use.
LOWNIBBLE_EXPORT std::int32_t lownibble_has_low_rank() { return active_low_rank() != nullptr; }

// out (T, r) = scale x F, with x (T, C) and F (C, r), whose element (c, i) is factor[c * step + i * stride]. 0, or -1 when there
// is no memory for the packed factor.
LOWNIBBLE_EXPORT std::int32_t lownibble_low_rank(const float* x, std::int64_t T, std::int64_t C, const float* factor,
                                                 std::int64_t r, std::int64_t step, std::int64_t stride, float scale, float* out,
                                                 std::int32_t num_threads) {
    std::int32_t failed = 0;
    in_parallel(T, T * C * r, num_threads, [&](Range rows) {
        float* const memory = static_cast<float*>(scratch.of(static_cast<std::size_t>(low_rank_scratch(C, r))));
        if (!memory) {
            failed = -1;
            return;
        }
        active_low_rank()->project(x, C, Factor{factor, step, stride}, r, scale, out, memory, rows);
    });
    return failed;
}

// Size in floats of the `sums` buffer of lownibble_low_rank_backward, for T rows.
LOWNIBBLE_EXPORT std::int64_t lownibble_low_rank_sums(std::int64_t T, std::int64_t N, std::int64_t K, std::int64_t r) {
    return low_rank_shares(T) * low_rank_sums(N, K, r);
}

// dlow (T, r), db (N, r) and da (r, K) from dy (T, N), x (T, K), low (T, r) and B (N, r); `sums` is aligned to 64 bytes. 0, or -1
// when there is no memory for the packed factor.
LOWNIBBLE_EXPORT std::int32_t lownibble_low_rank_backward(const float* dy, const float* x, const float* low, std::int64_t T,
                                                          std::int64_t N, std::int64_t K, const float* factor, std::int64_t r,
                                                          std::int64_t step, std::int64_t stride, float scale, float* dlow,
                                                          float* db, float* da, float* sums, std::int32_t num_threads) {
    const LowRankBackward job{dy, x, low, Factor{factor, step, stride}, N, K, r, scale, dlow};
    const std::int64_t shares = low_rank_shares(T), floats = low_rank_sums(N, K, r);
    std::int32_t failed = 0;
    in_turns(shares, T * (N + K) * r, num_threads, [&](std::int64_t share) {
        float* const memory = static_cast<float*>(scratch.of(static_cast<std::size_t>(low_rank_scratch(N, r))));
        if (!memory) {
            failed = -1;
            return;
        }
        active_low_rank()->backward(job, sums + share * floats, memory, Range{T * share / shares, T * (share + 1) / shares});
    });
    if (failed) return failed;
    const std::int64_t tiles = (K + kRankLanes - 1) / kRankLanes, tiles_n = (N + kRankLanes - 1) / kRankLanes;
    in_parallel(tiles_n + tiles, shares * floats, num_threads, [&](Range all) {
        const Range n{smaller(N, smaller(all.begin, tiles_n) * kRankLanes), smaller(N, smaller(all.end, tiles_n) * kRankLanes)};
        const std::int64_t first = all.begin > tiles_n ? all.begin - tiles_n : 0, last = all.end > tiles_n ? all.end - tiles_n : 0;
        active_low_rank()->sum_shares(job, sums, shares, db, da, n, Range{first, last});
    });
    return 0;
}

// Bytes of the structures in decoder.h, in order, for kernels/cpu/decoder.py to compare with its own.
LOWNIBBLE_EXPORT std::int32_t lownibble_decoder_sizes(std::int32_t which) {
    const std::size_t sizes[] = {sizeof(Linear4bit), sizeof(DecoderLayer), sizeof(LowRank),
                                 sizeof(Segment),    sizeof(Context),      sizeof(Tokens)};
    return static_cast<std::int32_t>(sizes[which]);
}

LOWNIBBLE_EXPORT std::int64_t lownibble_decoder_workspace(const DecoderLayer* layer, std::int64_t T, std::int64_t largest_r,
                                                          std::int64_t longest, std::int32_t num_threads) {
    return decoder_workspace(*layer, T, largest_r, longest, num_threads);
}

// 0, or -1 when there is no memory for a group of panels a thread; then nothing was computed.
LOWNIBBLE_EXPORT std::int32_t lownibble_decoder_layers(const DecoderLayer* layers, std::int64_t n_layers, const Tokens* tokens,
                                                       std::int64_t largest_r, float* workspace, std::int32_t num_threads) {
    std::int32_t failed = 0;
    const std::size_t bytes = static_cast<std::size_t>(matmul_scratch(0));
#if defined(_OPENMP)
#pragma omp parallel num_threads(num_threads)
    {
        void* const memory = scratch.of(bytes);
        if (!memory) {
#pragma omp atomic write
            failed = -1;
        }
#pragma omp barrier
        if (!failed) {
            const Worker worker{active,
                                active_matmul(),
                                memory,
                                omp_get_thread_num(),
                                omp_get_num_threads(),
                                [] {
#pragma omp barrier
                                }};
            decoder_layers(layers, n_layers, *tokens, largest_r, workspace, worker);
        }
    }
#else
    (void)num_threads;
    void* const memory = scratch.of(bytes);
    if (!memory) return -1;
    decoder_layers(layers, n_layers, *tokens, largest_r, workspace, Worker{active, active_matmul(), memory, 0, 1, [] {}});
#endif
    return failed;
}

// out (T, N) = x (T, K) W^T, with W (N, K) in bfloat16.
LOWNIBBLE_EXPORT void lownibble_gemv_bf16(const float* x, std::int64_t T, std::int64_t K, const void* w, float* out,
                                          std::int64_t N, std::int32_t num_threads) {
    in_parallel(T ? N : 0, N * K, num_threads,
                [&](Range rows) { active->gemv_dense(x, T, K, DType::bfloat16, w, out, N, rows); });
}

// 1 when the two functions below may be called with the instruction set in use.
LOWNIBBLE_EXPORT std::int32_t lownibble_has_attention() { return active_attention() != nullptr; }

// 0, or -1 when there is no memory for a thread's scores. `strides`: three for each of q, k, v and out. `cu_seqlens`:
// over the concatenated rows; segment i is [cu_seqlens[i], cu_seqlens[i + 1]) and lies within a row. lse (tokens, heads).
LOWNIBBLE_EXPORT std::int32_t lownibble_attention(const float* q, const float* k, const float* v, float* out,
                                                  const std::int64_t* strides, float* lse, const std::int64_t* cu_seqlens,
                                                  std::int64_t n_segments, std::int64_t row_tokens, std::int64_t heads,
                                                  std::int64_t key_heads, std::int64_t D, float scaling,
                                                  std::int32_t num_threads) {
    const Heads q_heads = heads_of(q, strides), k_heads = heads_of(k, strides + 3), v_heads = heads_of(v, strides + 6);
    const Heads out_heads = heads_of(out, strides + 9);
    std::int32_t failed = 0;
    in_turns(n_segments * heads, INT64_MAX, num_threads, [&](std::int64_t item) {
        const std::int64_t begin = cu_seqlens[item / heads], L = cu_seqlens[item / heads + 1] - begin, head = item % heads;
        if (!L) return;
        float* const memory = static_cast<float*>(scratch.of(static_cast<std::size_t>(attention_scratch(L, D, false)) * 4));
        if (!memory) {
            failed = -1;
            return;
        }
        const std::int64_t key_head = head / (heads / key_heads);
        active_attention()->forward(q_heads.at(begin, head, row_tokens), k_heads.at(begin, key_head, row_tokens),
                                    v_heads.at(begin, key_head, row_tokens), out_heads.at(begin, head, row_tokens),
                                    lse + begin * heads + head, heads, L, D, scaling, memory);
    });
    return failed;
}

// As above, with strides of dout, q, k, v, out, dq, dk and dv.
LOWNIBBLE_EXPORT std::int32_t lownibble_attention_backward(const float* dout, const float* q, const float* k, const float* v,
                                                           const float* out, float* dq, float* dk, float* dv,
                                                           const std::int64_t* strides, const float* lse,
                                                           const std::int64_t* cu_seqlens, std::int64_t n_segments,
                                                           std::int64_t row_tokens, std::int64_t heads, std::int64_t key_heads,
                                                           std::int64_t D, float scaling, std::int32_t num_threads) {
    const float* const data[8] = {dout, q, k, v, out, dq, dk, dv};
    Heads all[8];
    for (int i = 0; i < 8; ++i) all[i] = heads_of(data[i], strides + 3 * i);
    const std::int64_t group = heads / key_heads;
    const std::int64_t head_steps[4] = {all[0].strides[2], all[1].strides[2], all[4].strides[2], all[5].strides[2]};
    std::int32_t failed = 0;
    in_turns(n_segments * key_heads, INT64_MAX, num_threads, [&](std::int64_t item) {
        const std::int64_t begin = cu_seqlens[item / key_heads], L = cu_seqlens[item / key_heads + 1] - begin;
        if (!L) return;
        float* const memory = static_cast<float*>(scratch.of(static_cast<std::size_t>(attention_scratch(L, D, true)) * 4));
        if (!memory) {
            failed = -1;
            return;
        }
        const std::int64_t key_head = item % key_heads, head = key_head * group;
        const auto at = [&](int i, std::int64_t which) { return all[i].at(begin, which, row_tokens); };
        active_attention()->backward(at(0, head), at(1, head), at(2, key_head), at(3, key_head), at(4, head),
                                     lse + begin * heads + head, heads, at(5, head), at(6, key_head), at(7, key_head), group,
                                     head_steps, L, D, scaling, memory);
    });
    return failed;
}

// x (rows, n) := scale * softmax of each row; lse (rows,).
LOWNIBBLE_EXPORT void lownibble_softmax_rows(float* x, std::int64_t rows, std::int64_t n, float scale, float* lse,
                                             std::int32_t num_threads) {
    in_parallel(rows, rows * n, num_threads, [&](Range range) {
        for (std::int64_t row = range.begin; row < range.end; ++row) lse[row] = active->softmax_row(x + row * n, n, scale);
    });
}
