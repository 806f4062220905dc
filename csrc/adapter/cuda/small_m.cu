// architectures: sm_80 sm_90 sm_100
// The adapter for a few tokens, as an operator of torch on a GPU. Python has checked shapes, dtypes and devices.
#include <optional>
#include <tuple>

#include "common/torch_library.h"
#include "launches.h"

namespace lynx::adapter {
namespace {

Values values_of(const Tensor& tensor, int64_t stride = 0) {
    return lynx::values_of(tensor.const_data_ptr(), dtype_of(tensor), stride);
}

Values values_of(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? values_of(*tensor) : Values{nullptr, Dtype::kFloat, false};
}

Matrix matrix_of(const Tensor& tensor) {
    return {tensor.const_data_ptr(), dtype_of(tensor), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> adapter_small_m(
    const Tensor& x, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
    const Tensor& down_weight, const std::optional<Tensor>& down_bias, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const Tensor& scale, double eps, int64_t activation) {
    const int64_t tokens = x.size(0), width = x.size(1), bottleneck = down_weight.size(0);
    const int64_t statistics = norm_weight.has_value() ? tokens : 0;
    Tensor out = torch::stable::new_empty(x, {tokens, width});
    Tensor mean = torch::stable::new_empty(x, {statistics}, torch::headeronly::ScalarType::Float);
    Tensor rstd = torch::stable::new_empty(x, {statistics}, torch::headeronly::ScalarType::Float);
    Tensor preactivation = torch::stable::new_empty(down_weight, {tokens, bottleneck});
    Tensor activated = torch::stable::new_empty(down_weight, {tokens, bottleneck});
    const OnDevice run(x);
    forward({tokens, width, bottleneck, static_cast<float>(eps), static_cast<Activation>(activation),
             values_of(x, x.stride(0)), x.stride(0), values_of(norm_weight), values_of(norm_bias),
             matrix_of(down_weight), values_of(down_bias), matrix_of(up_weight), values_of(up_bias), values_of(scale),
             static_cast<float*>(mean.mutable_data_ptr()), static_cast<float*>(rstd.mutable_data_ptr()),
             preactivation.mutable_data_ptr(), activated.mutable_data_ptr(), out.mutable_data_ptr(),
             run.multiprocessors()},
            run);
    return {out, mean, rstd, preactivation};
}

}  // namespace
}  // namespace lynx::adapter

STABLE_TORCH_LIBRARY_FRAGMENT(lynx_kernels_cuda, library) {
    library.def(
        "adapter_small_m(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor down_weight, Tensor? down_bias, "
        "Tensor up_weight, Tensor? up_bias, Tensor scale, float eps, int activation) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lynx_kernels_cuda, CUDA, library) {
    library.impl("adapter_small_m", TORCH_BOX(&lynx::adapter::adapter_small_m));
}
