// The activations of the adapter, in fp32. A NaN stays one.
#pragma once

#include "common/vector.h"
#include "adapter/problem.h"

namespace {

// x / (1 + e^-y): silu with y = x. Where y < -80 what is left of x is 0 in every dtype.
LYNX_INLINE Floats logistic(Floats x, Floats y) { return x / (1.0f + exp(-maximum(broadcast(-80.0f), y))); }

// x Phi(x) = max(x, 0) - |x| Q(|x|), Q(a) = 1 - Phi(a): written so, nothing cancels for negative x.
// Q(a) = e^(-a^2/2) t P(t) with t = 1 / (1 + 0.3 a); P is the polynomial of degree 7 that makes the largest relative
// error for 0 <= a <= 13 smallest: 1.1e-7.
LYNX_INLINE Floats gelu(Floats x) {
    const Floats magnitude = maximum(x, -x);
    const Floats a = magnitude > 13.0f ? broadcast(13.0f) : magnitude;  // 13 Q(13) is 8e-38
    const Floats t = 1.0f / (1.0f + 0.3f * a);
    const float coefficients[] = {0.03619496714f, -0.1593787509f, 0.210119117f,  -0.05716800485f,
                                  0.1304167807f,  0.09934702785f, 0.1208455453f, 0.1196232617f};
    Floats p = {};
    for (float each : coefficients) p = p * t + each;
    return maximum(Floats{}, x) - a * (exp(a * a * -0.5f) * t * p);
}

LYNX_INLINE Floats activate(lynx::Activation activation, Floats x) {
    switch (activation) {
        case lynx::Activation::kSilu: return logistic(x, x);
        case lynx::Activation::kRelu: return maximum(Floats{}, x);
        case lynx::Activation::kGelu: return gelu(x);
        case lynx::Activation::kGeluTanh:  // 1 + tanh(y) = 2 / (1 + e^-2y)
            return logistic(x, x * (1.0f + 0.044715f * x * x) * 1.59576912f);  // 2 sqrt(2 / pi)
    }
    __builtin_unreachable();
}

}  // namespace
