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

// Query heads, key heads, the head dimension, and that of the values.
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;

// The scale, the soft cap (0: none), and the address of the sinks (0: none).
using Scores = std::tuple<float, float, uintptr_t>;

Problem problem_of(const Sizes& sizes, const Scores& scores, bool is_bfloat16) {
    Problem problem = {};
    std::tie(problem.num_heads, problem.num_kv_heads, problem.head_dim, problem.value_dim) = sizes;
    uintptr_t sinks;
    std::tie(problem.scale, problem.softcap, sinks) = scores;
    problem.sinks = pointer<float>(sinks);
    problem.is_bfloat16 = is_bfloat16;
    return problem;
}

// Address, rows and columns.
using Table = std::tuple<uintptr_t, int64_t, int64_t>;

}  // namespace

// Dtypes are bf16 or fp32, LSEs and sinks fp32, tables int32.
void bind_attention(py::module_& module) {
    py::class_<Layout>(module, "Layout");
    module.def("packed_layout", [](const Table& runs, const Table& tokens, const Table& key_runs, int64_t window,
                                   int64_t chunk) {
        return read_packed_layout({pointer<int32_t>(std::get<0>(runs)), std::get<1>(runs) - 1, std::get<2>(runs),
                                   pointer<int32_t>(std::get<0>(tokens)), pointer<int32_t>(std::get<0>(key_runs)),
                                   std::get<1>(key_runs) - 1, std::get<2>(tokens), window, chunk});
    });
    module.def("span_layout", [](uintptr_t table, int64_t rows, int64_t num_queries, int64_t num_keys) {
        return read_span_layout(pointer<int32_t>(table), rows, num_queries, num_keys);
    });
    module.def("attention_forward", [](const Layout& layout, const Sizes& sizes, const Scores& scores, bool is_bfloat16,
                                       const View& q, const View& k, const View& v, const View& out, uintptr_t lse,
                                       int threads) {
        Problem problem = problem_of(sizes, scores, is_bfloat16);
        problem.q = matrix(q), problem.k = matrix(k), problem.v = matrix(v);
        problem.out = matrix(out), problem.lse = pointer<float>(lse);
        py::gil_scoped_release release;
        forward(layout, problem, threads);
    });
    module.def("attention_backward",
               [](const Layout& layout, const Sizes& sizes, const Scores& scores, bool is_bfloat16, const View& dout,
                  uintptr_t dlse, const View& out, uintptr_t lse, const View& q, const View& k, const View& v,
                  const View& dq, const View& dk, const View& dv, int threads) {
                   Problem problem = problem_of(sizes, scores, is_bfloat16);
                   problem.q = matrix(q), problem.k = matrix(k), problem.v = matrix(v);
                   problem.out = matrix(out), problem.lse = pointer<float>(lse);
                   problem.dout = matrix(dout), problem.dlse = pointer<float>(dlse);
                   problem.dq = matrix(dq), problem.dk = matrix(dk), problem.dv = matrix(dv);
                   py::gil_scoped_release release;
                   backward(layout, problem, threads);
               });
}

}  // namespace lynx
