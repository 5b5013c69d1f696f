// NEON (aarch64): 16 lanes are four registers, and so is the table, which tbl looks up bytewise.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "algorithms.h"

namespace lownibble {
namespace {

struct Neon {
    struct Lanes {
        float32x4_t at[4];
    };
    using Table = Lanes;
    struct Coder {
        const float* bounds;
        uint8x16_t order;
    };
    static constexpr bool kStreams = false, kBitLookup = false;
    static constexpr int kTile = 4, kRows = 1, kColumns = 4;

    static Lanes load(const float* p) {
        return each([&](int i) { return vld1q_f32(p + 4 * i); });
    }
    static Lanes load(const BFloat16* p) {
        return each([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p[4 * i].bits), 16)); });
    }
    static Lanes load(const Float16* p) {
        return each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p[4 * i].bits))); });
    }
    static Lanes load(const std::int8_t* p) { return converted(p); }
    static Lanes load(const Float8* p) { return converted(p); }

    static void store(float* p, const Lanes& v) {
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.at[i]);
    }
    // To nearest even; a NaN stays one.
    static void store(BFloat16* p, const Lanes& v) {
        for (int i = 0; i < 4; ++i) {
            const uint32x4_t bits = vreinterpretq_u32_f32(v.at[i]);
            const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
            const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7FFF));
            const uint32x4_t number = vceqq_f32(v.at[i], v.at[i]);
            vst1_u16(&p[4 * i].bits, vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7FC00000)), 16));
        }
    }
    static void store(Float16* p, const Lanes& v) {
        for (int i = 0; i < 4; ++i) vst1_u16(&p[4 * i].bits, vreinterpret_u16_f16(vcvt_f16_f32(v.at[i])));
    }

    static Lanes zero() { return fill(0.0f); }
    static Lanes fill(float value) {
        return each([&](int) { return vdupq_n_f32(value); });
    }
    static Lanes add(const Lanes& a, const Lanes& b) {
        return each([&](int i) { return vaddq_f32(a.at[i], b.at[i]); });
    }
    static Lanes multiply(const Lanes& a, const Lanes& b) {
        return each([&](int i) { return vmulq_f32(a.at[i], b.at[i]); });
    }
    static Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
        return each([&](int i) { return vfmaq_f32(c.at[i], a.at[i], b.at[i]); });
    }
    static float sum(const Lanes& v) { return vaddvq_f32(vaddq_f32(vaddq_f32(v.at[0], v.at[1]), vaddq_f32(v.at[2], v.at[3]))); }
    static Lanes absolute(const Lanes& v) {
        return each([&](int i) { return vabsq_f32(v.at[i]); });
    }
    static Lanes maximum(const Lanes& a, const Lanes& b) {
        return each([&](int i) { return vmaxq_f32(a.at[i], b.at[i]); });
    }
    static float largest(const Lanes& v) {
        return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v.at[0], v.at[1]), vmaxq_f32(v.at[2], v.at[3])));
    }
    static Lanes clamp_to_one(const Lanes& v) {
        return each([&](int i) { return vminq_f32(vmaxq_f32(v.at[i], vdupq_n_f32(-1.0f)), vdupq_n_f32(1.0f)); });
    }

    static Table table(const float* values) { return load(values); }
    static Table scaled(const Table& t, float constant) { return multiply(t, fill(constant)); }
    // Code c stands for the table's bytes 4c to 4c + 3: four times each index, plus 0 1 2 3.
    static Lanes lookup(const Table& t, const std::uint8_t* codes) {
        static const std::uint8_t kSpread[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
        const uint8x8_t bytes = vld1_u8(codes);
        const uint8x8_t first = vshl_n_u8(vshr_n_u8(bytes, 4), 2), second = vshl_n_u8(vand_u8(bytes, vdup_n_u8(15)), 2);
        const uint8x16_t starts = vcombine_u8(vzip1_u8(first, second), vzip2_u8(first, second));
        const uint8x16_t spread = vld1q_u8(kSpread);
        const uint8x16_t within = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100));
        const uint8x16x4_t table = {{vreinterpretq_u8_f32(t.at[0]), vreinterpretq_u8_f32(t.at[1]),
                                     vreinterpretq_u8_f32(t.at[2]), vreinterpretq_u8_f32(t.at[3])}};
        return each([&](int i) {
            const uint8x16_t lanes = vaddq_u8(spread, vdupq_n_u8(static_cast<std::uint8_t>(4 * i)));
            return vreinterpretq_f32_u8(vqtbl4q_u8(table, vorrq_u8(vqtbl1q_u8(starts, lanes), within)));
        });
    }

    static Coder coder(const Encoder4bit& encoder) { return {encoder.bounds, vld1q_u8(encoder.order)}; }
    // The index is the number of bounds below the value; a true comparison is -1.
    static void encode(std::uint8_t* codes, const Lanes& v, const Coder& coder) {
        uint16x4_t index[4];
        for (int quarter = 0; quarter < 4; ++quarter) {
            uint32x4_t count = vdupq_n_u32(0);
            for (int i = 0; i < 15; ++i) count = vsubq_u32(count, vcgtq_f32(v.at[quarter], vdupq_n_f32(coder.bounds[i])));
            index[quarter] = vmovn_u32(count);
        }
        const uint8x8_t low = vmovn_u16(vcombine_u16(index[0], index[1])), high = vmovn_u16(vcombine_u16(index[2], index[3]));
        const uint8x16_t ordered = vqtbl1q_u8(coder.order, vcombine_u8(low, high));
        const uint8x16_t pairs = vorrq_u8(vshlq_n_u8(vuzp1q_u8(ordered, ordered), 4), vuzp2q_u8(ordered, ordered));
        vst1_u8(codes, vget_low_u8(pairs));
    }

private:
    template <class Byte>
    static Lanes converted(const Byte* p) {
        float values[16];
        for (int i = 0; i < 16; ++i) values[i] = to_float(p[i]);
        return load(values);
    }
    template <class Value>
    static Lanes each(Value value) {
        return {{value(0), value(1), value(2), value(3)}};
    }
};

}  // namespace

const Kernels kNeonKernels = kernels_for<Neon>("neon");

}  // namespace lownibble

#endif
