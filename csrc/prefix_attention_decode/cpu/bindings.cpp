#include "common/bindings.h"

#include <tuple>
#include <utility>

#include "decode.h"

namespace py = pybind11;

namespace lynx {
namespace {

using namespace decode;

// (address, strides of entries, rows and heads), strides in elements.
using CacheView = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

Cache cache(const CacheView& view) {
    const auto [address, stride, row_stride, head_stride] = view;
    return {{pointer<void>(address), row_stride, head_stride}, stride};
}

// (address, strides of rows and heads).
using MatrixView = std::tuple<uintptr_t, int64_t, int64_t>;

Matrix matrix(const MatrixView& view) {
    const auto [address, row_stride, head_stride] = view;
    return {pointer<void>(address), row_stride, head_stride};
}

// (address, whether it is int64, else int32).
using IndexView = std::pair<uintptr_t, bool>;

Index index(const IndexView& view) { return {pointer<void>(view.first), view.second}; }

// Query heads, key heads, the head dimension, and that of the values.
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;

// The scale, the soft cap (0: none), and the address of the sinks (0: none).
using Scores = std::tuple<float, float, uintptr_t>;

}  // namespace

// Dtypes are bf16 or fp32, LSEs and sinks fp32.
void bind_decode(py::module_& module) {
    // `counts` are the branches, the queries and the ranges of a branch; `capacities` the shared keys, and the keys that
    // a branch has room for; `locality` the window and the chunk (0: none).
    module.def("attention_decode",
               [](const std::tuple<int64_t, int64_t, int64_t>& counts, const std::pair<int64_t, int64_t>& capacities,
                  const Sizes& sizes, const std::pair<int64_t, int64_t>& locality, const Scores& scores,
                  bool is_bfloat16, const CacheView& q, const MatrixView& shared_k, const MatrixView& shared_v,
                  const CacheView& branch_k, const CacheView& branch_v, const IndexView& ranges,
                  const IndexView& branch_lengths, uintptr_t out, uintptr_t lse, int threads) {
                   Problem problem = {};
                   std::tie(problem.num_branches, problem.num_queries, problem.num_ranges) = counts;
                   std::tie(problem.num_shared, problem.branch_capacity) = capacities;
                   std::tie(problem.num_heads, problem.num_kv_heads, problem.head_dim, problem.value_dim) = sizes;
                   std::tie(problem.window, problem.chunk) = locality;
                   uintptr_t sinks;
                   std::tie(problem.scale, problem.softcap, sinks) = scores;
                   problem.sinks = pointer<float>(sinks), problem.is_bfloat16 = is_bfloat16;
                   problem.q = cache(q), problem.shared_k = matrix(shared_k), problem.shared_v = matrix(shared_v);
                   problem.branch_k = cache(branch_k), problem.branch_v = cache(branch_v);
                   problem.ranges = index(ranges), problem.branch_lengths = index(branch_lengths);
                   problem.out = pointer<void>(out), problem.lse = pointer<float>(lse);
                   py::gil_scoped_release release;
                   forward(problem, threads);
               });
}

}  // namespace lynx
