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

// (address, whether it is int64, else int32).
using IndexView = std::pair<uintptr_t, bool>;

Index index(const IndexView& view) { return {pointer<void>(view.first), view.second}; }

// Query heads, key heads and the head dimension.
using Sizes = std::tuple<int64_t, int64_t, int64_t>;

}  // namespace

// Dtypes are bf16 or fp32, LSEs fp32.
void bind_decode(py::module_& module) {
    // `counts` are the branches, the roots and the queries of a branch. `capacities` are the keys that a root and a
    // branch have room for.
    module.def("attention_decode",
               [](const std::tuple<int64_t, int64_t, int64_t>& counts, const std::pair<int64_t, int64_t>& capacities,
                  const Sizes& sizes, float scale, bool is_bfloat16, const CacheView& q, const CacheView& root_k,
                  const CacheView& root_v, const CacheView& branch_k, const CacheView& branch_v,
                  const IndexView& branch_to_root, const IndexView& root_lengths, const IndexView& branch_lengths,
                  uintptr_t out, uintptr_t lse, int threads) {
                   Problem problem = {};
                   std::tie(problem.num_branches, problem.num_roots, problem.num_queries) = counts;
                   std::tie(problem.root_capacity, problem.branch_capacity) = capacities;
                   std::tie(problem.num_heads, problem.num_kv_heads, problem.head_dim) = sizes;
                   problem.scale = scale, problem.is_bfloat16 = is_bfloat16;
                   problem.q = cache(q), problem.root_k = cache(root_k), problem.root_v = cache(root_v);
                   problem.branch_k = cache(branch_k), problem.branch_v = cache(branch_v);
                   problem.branch_to_root = index(branch_to_root);
                   problem.root_lengths = index(root_lengths), problem.branch_lengths = index(branch_lengths);
                   problem.out = pointer<void>(out), problem.lse = pointer<float>(lse);
                   py::gil_scoped_release release;
                   forward(problem, threads);
               });
}

}  // namespace lynx
