// No instruction set beyond the machine's baseline. Also the reference for the others in tests/kernels/native_check.cpp.
#include "algorithms.h"

namespace lownibble {
namespace {

struct Scalar {
    struct Lanes {
        float at[kLanes];
    };
    using Table = Lanes;
    using Coder = Encoder4bit;
    static constexpr bool kStreams = false, kBitLookup = false;
    static constexpr int kTile = 2, kRows = 1, kColumns = 2;

    template <class In>
    static Lanes load(const In* p) {
        return each([&](int i) { return to_float(p[i]); });
    }
    template <class Out>
    static void store(Out* p, const Lanes& v) {
        for (int i = 0; i < kLanes; ++i) from_float(p + i, v.at[i]);
    }

    static Lanes zero() { return fill(0.0f); }
    static Lanes fill(float value) {
        return each([&](int) { return value; });
    }
    static Lanes add(const Lanes& a, const Lanes& b) {
        return each([&](int i) { return a.at[i] + b.at[i]; });
    }
    static Lanes multiply(const Lanes& a, const Lanes& b) {
        return each([&](int i) { return a.at[i] * b.at[i]; });
    }
    static Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {  // two roundings: the baseline has no fused one
        return each([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
    }
    static float sum(Lanes v) {
        for (int half = kLanes / 2; half; half /= 2) {
            for (int i = 0; i < half; ++i) v.at[i] += v.at[i + half];
        }
        return v.at[0];
    }
    static Lanes absolute(const Lanes& v) {
        return each([&](int i) { return magnitude(v.at[i]); });
    }
    static Lanes maximum(const Lanes& a, const Lanes& b) {
        return each([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
    }
    static float largest(const Lanes& v) {
        float most = v.at[0];
        for (float value : v.at) most = value > most ? value : most;
        return most;
    }
    static Lanes clamp_to_one(const Lanes& v) {
        return each([&](int i) { return clamped(v.at[i]); });
    }

    static Table table(const float* values) { return load(values); }
    static Table scaled(const Table& t, float constant) { return multiply(t, fill(constant)); }
    static Lanes lookup(const Table& t, const std::uint8_t* codes) {
        return each([&](int i) { return t.at[code_at(codes, i)]; });
    }

    static Coder coder(const Encoder4bit& encoder) { return encoder; }
    static void encode(std::uint8_t* codes, const Lanes& v, const Coder& coder) {
        for (int i = 0; i < kLanes; i += 2) {
            codes[i / 2] = static_cast<std::uint8_t>(encode_one(coder, v.at[i]) << 4 | encode_one(coder, v.at[i + 1]));
        }
    }

private:
    template <class Value>
    static Lanes each(Value value) {
        Lanes lanes;
        for (int i = 0; i < kLanes; ++i) lanes.at[i] = value(i);
        return lanes;
    }
};

}  // namespace

const Kernels kScalarKernels = kernels_for<Scalar>("scalar");

}  // namespace lownibble
