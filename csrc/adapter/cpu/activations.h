// The activations of the adapter in fp32. NaN stays NaN.
#pragma once

#include "adapter/activation.h"
#include "common/vector.h"

namespace {

// x / (1 + e^-y), which is silu for y = x. Below y = -80 the result is 0 in every dtype.
LYNX_INLINE Floats logistic(Floats x, Floats y) { return x / (1.0f + exp(-maximum(broadcast(-80.0f), y))); }

// x Phi(x) = max(x, 0) - |x| Q(|x|) with Q(a) = 1 - Phi(a). In this form nothing cancels for negative x. Q(a) =
// e^(-a^2/2) t P(t) with t = 1 / (1 + 0.3 a). P is the polynomial of degree 7 of the smallest maximal relative error
// for 0 <= a <= 13: 1.1e-7.
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

LYNX_INLINE Floats activate(lynx::adapter::Activation activation, Floats x) {
    using lynx::adapter::Activation;
    switch (activation) {
        case Activation::kSilu: return logistic(x, x);
        case Activation::kRelu: return maximum(Floats{}, x);
        case Activation::kGelu: return gelu(x);
        case Activation::kGeluTanh:  // 1 + tanh(y) = 2 / (1 + e^-2y)
            return logistic(x, x * (1.0f + 0.044715f * x * x) * 1.59576912f);  // 2 sqrt(2 / pi)
    }
    __builtin_unreachable();
}

}  // namespace
