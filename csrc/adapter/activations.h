// The activations of the adapter in fp32: their names, and for each name a function for a CPU and one for a GPU. NaN stays
// NaN.
#pragma once

// In the order of lynx_kernels/ops/adapter/activations.py, because the CUDA operator takes an activation as a number.
#define LYNX_ACTIVATIONS(X) X(silu) X(relu) X(gelu) X(gelu_tanh)

namespace lynx::adapter {

#define LYNX_ENUMERATOR(name) name,
enum class Activation { LYNX_ACTIVATIONS(LYNX_ENUMERATOR) };
#undef LYNX_ENUMERATOR

#define LYNX_ONE(name) +1
constexpr int kNumActivations = LYNX_ACTIVATIONS(LYNX_ONE);
#undef LYNX_ONE

}  // namespace lynx::adapter

#define LYNX_CALL_ACTIVATION(name) \
    case lynx::adapter::Activation::name: return name(x);

#if defined(LYNX_KERNELS)  // in the kernels of a CPU, one vector at a time

#include "common/vector.h"

namespace {
namespace activations {

// x / (1 + e^-y), which is silu for y = x. Below y = -80 the result is 0 in every dtype.
LYNX_INLINE Floats logistic(Floats x, Floats y) { return x / (1.0f + exp(-maximum(broadcast(-80.0f), y))); }

LYNX_INLINE Floats silu(Floats x) { return logistic(x, x); }

LYNX_INLINE Floats relu(Floats x) { return maximum(Floats{}, x); }

// x Phi(x) = max(x, 0) - |x| Q(|x|) with Q(a) = 1 - Phi(a). In this form nothing cancels for negative x.
// Q(a) = e^(-a^2/2) t P(t) with t = 1 / (1 + 0.3 a). P is the polynomial of degree 7 of the smallest maximal relative
// error for 0 <= a <= 13: 1.1e-7.
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

// 1 + tanh(y) = 2 / (1 + e^-2y), and 1.59... is 2 sqrt(2 / pi).
LYNX_INLINE Floats gelu_tanh(Floats x) { return logistic(x, x * (1.0f + 0.044715f * x * x) * 1.59576912f); }

LYNX_INLINE Floats activate(lynx::adapter::Activation activation, Floats x) {
    switch (activation) { LYNX_ACTIVATIONS(LYNX_CALL_ACTIVATION) }
    __builtin_unreachable();
}

}  // namespace activations
}  // namespace

#else  // on a GPU, one number at a time

#include <cmath>

#include "common/portable.h"

namespace lynx::adapter::activations {

LYNX_PORTABLE float silu(float x) { return x / (1 + expf(-x)); }

LYNX_PORTABLE float relu(float x) { return x < 0 ? 0 : x; }

LYNX_PORTABLE float gelu(float x) { return x * 0.5f * (1 + erff(x * 0.70710678f)); }

LYNX_PORTABLE float gelu_tanh(float x) {
    return x * 0.5f * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
}

LYNX_PORTABLE float activate(Activation activation, float x) {
    switch (activation) { LYNX_ACTIVATIONS(LYNX_CALL_ACTIVATION) }
    return x;
}

}  // namespace lynx::adapter::activations

#endif

#undef LYNX_CALL_ACTIVATION
