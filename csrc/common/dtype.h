// The dtypes of tensors, for kernels and their callers.
#pragma once

namespace lynx {

enum class Dtype { kFloat, kHalf, kBFloat16, kDouble };

}  // namespace lynx
