// From bytes to normalised numbers: looked up in a table, or computed by vectors where that gives the very same.
#pragma once

#include "../vector.h"
#include "problem.h"

namespace {

template <class Element>
constexpr bool kIsComputed = false;

#if defined(__AVX2__)

template <>
constexpr bool kIsComputed<float> = true;
template <>
constexpr bool kIsComputed<BFloat16> = true;

// a * b + c, rounded once.
LYNX_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

// A number in two parts, the second what rounding left of the first: twice the precision.
struct Double {
    float high, low;

    LYNX_INLINE explicit Double(double value) : high((float)value), low((float)(value - (float)value)) {}
};

// (byte / 255 - mean) / std with products in place of divisions, which would take three times as long. With a divisor's
// reciprocal in two parts a quotient is off by some 2^-49 of itself before it is rounded, and rounds as the exact one
// does. Not so where numbers are subnormal: computes_levels compares all 768 levels.
class Levels {
   public:
    LYNX_INLINE Levels(float mean, float std) : mean_(mean), inverse_(1.0 / std) {}

    LYNX_INLINE Floats operator()(Bytes bytes) const {
        const Floats byte = __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
        return divided(divided(byte, Double(1.0 / 255)) - mean_, inverse_);
    }

   private:
    static LYNX_INLINE Floats divided(Floats x, Double inverse) {
        return fused(x, broadcast(inverse.high), x * inverse.low);
    }

    float mean_;
    Double inverse_;
};

// Bytes of one channel; `count` is at least a vector's, and the last vector overlaps the one before.
template <class Element>
void compute(const lynx::frames::Problem& problem, int channel, const uint8_t* bytes, int64_t count, Element* to) {
    const Levels levels(problem.mean[channel], problem.std[channel]);
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(to + i, levels(load_vector<Bytes>(bytes + i)));
    if (i < count) store(to + count - kWidth, levels(load_vector<Bytes>(bytes + count - kWidth)));
}

template <class Element>
bool computes_all(const lynx::frames::Problem& problem) {
    uint8_t bytes[256];
    for (int i = 0; i < 256; i++) bytes[i] = (uint8_t)i;
    for (int channel = 0; channel < 3; channel++) {
        Element computed[256];
        compute(problem, channel, bytes, 256, computed);
        if (memcmp(computed, static_cast<const Element*>(problem.levels) + 256 * channel, sizeof computed) != 0)
            return false;
    }
    return true;
}

bool computes_levels(const lynx::frames::Problem& problem) {
    if (problem.type == lynx::frames::ElementType::kFloat32) return computes_all<float>(problem);
    return problem.type == lynx::frames::ElementType::kBFloat16 && computes_all<BFloat16>(problem);
}

#else

bool computes_levels(const lynx::frames::Problem&) { return false; }

#endif

// Bytes of one channel.
template <class Element>
LYNX_INLINE void normalise(const lynx::frames::Problem& problem, int channel, bool computes_levels,
                           const uint8_t* bytes, int64_t count, Element* to) {
    if constexpr (kIsComputed<Element>)
        if (computes_levels && count >= kWidth) return compute(problem, channel, bytes, count, to);
    const Element* levels = static_cast<const Element*>(problem.levels) + 256 * channel;
    for (int64_t i = 0; i < count; i++) to[i] = levels[bytes[i]];
}

}  // namespace
