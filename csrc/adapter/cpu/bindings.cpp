#include "common/bindings.h"

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "adapter.h"

namespace py = pybind11;

namespace lynx {
namespace {

using namespace adapter;

// (address, whether it is bf16, else fp32). The address is 0 if the argument is absent.
using NumbersView = std::pair<uintptr_t, bool>;

Numbers numbers(const NumbersView& given) { return {pointer<void>(given.first), given.second}; }

Activation activation_of(const std::string& given) {
#define LYNX_COMPARE(name) \
    if (given == #name) return Activation::name;
    LYNX_ACTIVATIONS(LYNX_COMPARE)
#undef LYNX_COMPARE
#define LYNX_NAME(name) " " #name
    throw std::invalid_argument("adapter: unknown activation '" + given +
                                "'; choose one of:" LYNX_ACTIVATIONS(LYNX_NAME));
#undef LYNX_NAME
}

LayerNorm layer_norm(int64_t tokens, int64_t width, const NumbersView& x, uintptr_t mean, uintptr_t rstd,
                     uintptr_t weight) {
    LayerNorm norm = {};
    norm.tokens = tokens, norm.width = width;
    norm.x = numbers(x), norm.weight = pointer<float>(weight);
    norm.mean = pointer<float>(mean), norm.rstd = pointer<float>(rstd);
    return norm;
}

}  // namespace

void bind_adapter(py::module_& module) {
    // `sizes` are the tokens, the width and the bottleneck. Mean and rstd are fp32, and 0 without a LayerNorm.
    module.def("adapter_forward",
               [](const std::tuple<int64_t, int64_t, int64_t>& sizes, float eps, const std::string& activation,
                  const NumbersView& x, const NumbersView& norm_weight, const NumbersView& norm_bias,
                  const NumbersView& down_weight, const NumbersView& down_bias, const NumbersView& up_weight,
                  const NumbersView& up_bias, const NumbersView& scale, const NumbersView& out, uintptr_t mean,
                  uintptr_t rstd, const NumbersView& preactivation, int threads) {
                   Problem problem = {};
                   std::tie(problem.tokens, problem.width, problem.bottleneck) = sizes;
                   problem.eps = eps, problem.activation = activation_of(activation);
                   problem.x = numbers(x), problem.scale = numbers(scale);
                   problem.norm_weight = numbers(norm_weight), problem.norm_bias = numbers(norm_bias);
                   problem.down_weight = numbers(down_weight), problem.down_bias = numbers(down_bias);
                   problem.up_weight = numbers(up_weight), problem.up_bias = numbers(up_bias);
                   problem.out = numbers(out), problem.preactivation = numbers(preactivation);
                   problem.mean = pointer<float>(mean), problem.rstd = pointer<float>(rstd);
                   py::gil_scoped_release release;
                   forward(problem, threads);
               });
    module.def("adapter_renormalize",
               [](int64_t tokens, int64_t width, const NumbersView& x, uintptr_t mean, uintptr_t rstd,
                  uintptr_t weight, uintptr_t bias, const NumbersView& normalized, int threads) {
                   LayerNorm norm = layer_norm(tokens, width, x, mean, rstd, weight);
                   norm.bias = pointer<float>(bias), norm.normalized = numbers(normalized);
                   py::gil_scoped_release release;
                   renormalize(norm, threads);
               });
    module.def("adapter_norm_backward",
               [](int64_t tokens, int64_t width, const NumbersView& x, uintptr_t mean, uintptr_t rstd,
                  uintptr_t weight, const NumbersView& normalized_grad, const NumbersView& grad,
                  const NumbersView& x_grad, uintptr_t weight_grad, uintptr_t bias_grad, int threads) {
                   LayerNorm norm = layer_norm(tokens, width, x, mean, rstd, weight);
                   norm.normalized_grad = numbers(normalized_grad), norm.grad = numbers(grad);
                   norm.x_grad = numbers(x_grad);
                   py::gil_scoped_release release;
                   norm_backward(norm, pointer<float>(weight_grad), pointer<float>(bias_grad), threads);
               });
}

}  // namespace lynx
