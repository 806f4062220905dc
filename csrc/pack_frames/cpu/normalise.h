// From bytes to normalised numbers: looked up in a table, or computed by vector code where that gives exactly the same.
#pragma once

#include "common/vector.h"
#include "problem.h"

namespace {

#if defined(__AVX2__)

// a * b + c, rounded once.
LYNX_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

// A number as the sum of two, which doubles the precision: `low` is the rounding error of `high`.
struct Double {
    float high, low;

    LYNX_INLINE explicit Double(double value) : high((float)value), low((float)(value - (float)value)) {}
};

LYNX_INLINE Floats product(Floats x, Double y) { return fused(x, broadcast(y.high), x * y.low); }

// (byte / 255 - mean) / std by products, since divisions would take three times as long. With the reciprocal of the
// divisor in double precision, a quotient has a relative error of about 2^-49 before it is rounded, and rounds as the
// exact quotient does. Subnormal numbers are the exception, so computes_levels compares all 768 levels.
class Computed {
   public:
    LYNX_INLINE Computed(float mean, float std) : mean_(mean), inverse_(1.0 / std) {}

    // `count` is at least kWidth. The last vector overlaps the one before it.
    template <class Element>
    LYNX_INLINE void operator()(const uint8_t* bytes, int64_t count, Element* to) const {
        int64_t i = 0;
        for (; i + kWidth <= count; i += kWidth) store(to + i, level(bytes + i));
        if (i < count) store(to + count - kWidth, level(bytes + count - kWidth));
    }

   private:
    LYNX_INLINE Floats level(const uint8_t* bytes) const {
        const Floats byte = __builtin_convertvector(widen(load_vector<Bytes>(bytes)), Floats);
        return product(product(byte, Double(1.0 / 255)) - mean_, inverse_);
    }

    float mean_;
    Double inverse_;
};

template <class Element>
bool computes_all(const lynx::frames::Problem& problem) {
    uint8_t bytes[256];
    for (int i = 0; i < 256; i++) bytes[i] = (uint8_t)i;
    for (int channel = 0; channel < 3; channel++) {
        Element computed[256];
        Computed(problem.mean[channel], problem.std[channel])(bytes, 256, computed);
        if (memcmp(computed, static_cast<const Element*>(problem.levels) + 256 * channel, sizeof computed) != 0)
            return false;
    }
    return true;
}

bool computes_levels(const lynx::frames::Problem& problem) {
    if (problem.levels == nullptr) return false;
    if (problem.dtype == lynx::Dtype::kFloat) return computes_all<float>(problem);
    return problem.dtype == lynx::Dtype::kBFloat16 && computes_all<BFloat16>(problem);
}

#else

bool computes_levels(const lynx::frames::Problem&) { return false; }

#endif

template <class Element>
LYNX_INLINE void look_up(const Element* levels, const uint8_t* bytes, int64_t count, Element* to) {
    for (int64_t i = 0; i < count; i++) to[i] = levels[bytes[i]];
}

}  // namespace
