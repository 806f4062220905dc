// The activations of the adapter. lynx_kernels/ops/adapter/cuda.py gives them by these numbers.
#pragma once

namespace lynx::adapter {

enum class Activation { kSilu, kRelu, kGelu, kGeluTanh };

}  // namespace lynx::adapter
