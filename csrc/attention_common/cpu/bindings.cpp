#include "common/bindings.h"

#include <tuple>
#include <utility>

#include "attention.h"
#include "prefix_attention_decode/cpu/decode.h"

namespace py = pybind11;

namespace lynx {
namespace {

// (address, row stride, head stride), strides in elements.
using View = std::tuple<uintptr_t, int64_t, int64_t>;

Matrix matrix(const View& view) {
    const auto [address, row_stride, head_stride] = view;
    return {pointer<void>(address), row_stride, head_stride};
}

// (address, strides of entries, rows and heads), likewise.
using CacheView = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

Cache cache(const CacheView& view) {
    const auto [address, stride, row_stride, head_stride] = view;
    return {{pointer<void>(address), row_stride, head_stride}, stride};
}

// (address, whether it is int64 and not int32).
using IndexView = std::pair<uintptr_t, bool>;

Index index(const IndexView& view) { return {pointer<void>(view.first), view.second}; }

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
        attention_forward(layout, problem, threads);
    });
    module.def("attention_backward",
               [](const Layout& layout, const Sizes& sizes, float scale, bool is_bfloat16, const View& grad,
                  uintptr_t grad_lse, const View& out, uintptr_t lse, const View& q, const View& k, const View& v,
                  const View& grad_q, const View& grad_k, const View& grad_v, int threads) {
                   Problem problem = problem_of(layout, sizes, scale, is_bfloat16);
                   problem.q = matrix(q), problem.k = matrix(k), problem.v = matrix(v);
                   problem.out = matrix(out), problem.lse = pointer<float>(lse);
                   problem.grad = matrix(grad), problem.grad_lse = pointer<float>(grad_lse);
                   problem.grad_q = matrix(grad_q), problem.grad_k = matrix(grad_k);
                   problem.grad_v = matrix(grad_v);
                   py::gil_scoped_release release;
                   attention_backward(layout, problem, threads);
               });
    // `counts` are the branches, the roots and the queries of a branch; `room` the keys that a root and a branch have
    // room for.
    module.def("attention_decode",
               [](const std::tuple<int64_t, int64_t, int64_t>& counts, const std::pair<int64_t, int64_t>& room,
                  const Sizes& sizes, float scale, bool is_bfloat16, const CacheView& q, const CacheView& root_k,
                  const CacheView& root_v, const CacheView& branch_k, const CacheView& branch_v,
                  const IndexView& branch_to_root, const IndexView& root_lengths, const IndexView& branch_lengths,
                  uintptr_t out, uintptr_t lse, int threads) {
                   DecodeProblem problem = {};
                   std::tie(problem.num_branches, problem.num_roots, problem.num_queries) = counts;
                   std::tie(problem.root_room, problem.branch_room) = room;
                   std::tie(problem.num_heads, problem.num_kv_heads, problem.head_dim) = sizes;
                   problem.scale = scale, problem.is_bfloat16 = is_bfloat16;
                   problem.q = cache(q), problem.root_k = cache(root_k), problem.root_v = cache(root_v);
                   problem.branch_k = cache(branch_k), problem.branch_v = cache(branch_v);
                   problem.branch_to_root = index(branch_to_root);
                   problem.root_lengths = index(root_lengths), problem.branch_lengths = index(branch_lengths);
                   problem.out = pointer<void>(out), problem.lse = pointer<float>(lse);
                   py::gil_scoped_release release;
                   decode(problem, threads);
               });
}

}  // namespace lynx
