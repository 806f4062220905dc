// The dtypes of tensors, for callers and kernels alike.
#pragma once

namespace lynx {

enum class Dtype { kFloat, kHalf, kBFloat16, kDouble };

}  // namespace lynx
