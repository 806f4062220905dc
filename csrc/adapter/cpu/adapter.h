// The adapter's forward for a few tokens, on several threads; it reads each weight once. And the passes of its backward
// over the LayerNorm, for any number of tokens.
#pragma once

#include "problem.h"

namespace lynx::adapter {

// It allocates `normalized` and `activated`. Results do not depend on `threads`.
void forward(Problem problem, int threads);

// Writes `normalized`.
void renormalize(const LayerNorm& norm, int threads);

// Writes `x_grad` and the gradients of the LayerNorm's weight and bias, (width,) each, unless they are null.
void norm_backward(LayerNorm norm, float* weight_grad, float* bias_grad, int threads);

}  // namespace lynx::adapter
