#include "common/bindings.h"

#include <tuple>

#include "attention.h"

namespace py = pybind11;

namespace lynx {
namespace {

using namespace attention;

// (address, row stride, head stride), strides in elements.
using View = std::tuple<uintptr_t, int64_t, int64_t>;

Matrix matrix(const View& view) {
    const auto [address, row_stride, head_stride] = view;
    return {pointer<void>(address), row_stride, head_stride};
}

// Query heads, key heads and the head dimension.
using Sizes = std::tuple<int64_t, int64_t, int64_t>;

Problem problem_of(const Layout& layout, const Sizes& sizes, float scale, bool is_bfloat16) {
    Problem problem = {};
    problem.num_queries = layout.num_queries;
    problem.num_keys = layout.num_keys;
    std::tie(problem.num_heads, problem.num_kv_heads, problem.head_dim) = sizes;
    problem.scale = scale;
    problem.is_bfloat16 = is_bfloat16;
    return problem;
}

}  // namespace

// Dtypes are bf16 or fp32, LSEs fp32.
void bind_attention(py::module_& module) {
    py::class_<Layout>(module, "Layout");
    module.def("packed_layout", [](uintptr_t table, int64_t rows, int64_t num_tokens, bool root_is_causal) {
        return read_packed_layout(pointer<int32_t>(table), rows, num_tokens, root_is_causal);
    });
    module.def("span_layout", [](uintptr_t table, int64_t rows, int64_t num_queries, int64_t num_keys) {
        return read_span_layout(pointer<int32_t>(table), rows, num_queries, num_keys);
    });
    module.def("attention_forward", [](const Layout& layout, const Sizes& sizes, float scale, bool is_bfloat16,
                                       const View& q, const View& k, const View& v, const View& out, uintptr_t lse,
                                       int threads) {
        Problem problem = problem_of(layout, sizes, scale, is_bfloat16);
        problem.q = matrix(q), problem.k = matrix(k), problem.v = matrix(v);
        problem.out = matrix(out), problem.lse = pointer<float>(lse);
        py::gil_scoped_release release;
        forward(layout, problem, threads);
    });
    module.def("attention_backward",
               [](const Layout& layout, const Sizes& sizes, float scale, bool is_bfloat16, const View& dout,
                  uintptr_t dlse, const View& out, uintptr_t lse, const View& q, const View& k, const View& v,
                  const View& dq, const View& dk, const View& dv, int threads) {
                   Problem problem = problem_of(layout, sizes, scale, is_bfloat16);
                   problem.q = matrix(q), problem.k = matrix(k), problem.v = matrix(v);
                   problem.out = matrix(out), problem.lse = pointer<float>(lse);
                   problem.dout = matrix(dout), problem.dlse = pointer<float>(dlse);
                   problem.dq = matrix(dq), problem.dk = matrix(dk), problem.dv = matrix(dv);
                   py::gil_scoped_release release;
                   backward(layout, problem, threads);
               });
}

}  // namespace lynx
