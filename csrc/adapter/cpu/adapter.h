// The adapter's forward for a few tokens, on several threads: it reads each weight once. And backward's passes over the
// LayerNorm, for any number of tokens.
#pragma once

#include "adapter/problem.h"

namespace lynx {

// Allocates the operands itself. Results do not depend on `threads`.
void adapter_forward(Adapter adapter, int threads);

// Writes `normalized`.
void adapter_renormalize(const LayerNorm& norm, int threads);

// Writes `x_grad` and, (width,), the gradients of the LayerNorm's weight and bias, each where it is not null.
void adapter_norm_backward(LayerNorm norm, float* weight_grad, float* bias_grad, int threads);

}  // namespace lynx
