// architectures: sm_80 sm_90 sm_100
// prefix_attention_decode, as an operator of torch on a GPU. Python has checked shapes, dtypes, strides and devices.
// The kernels check indices.
#include <tuple>

#include "common/torch_library.h"
#include "launches.h"

namespace lynx::decode {
namespace {

Indices indices_of(const Tensor& tensor) {
    return {tensor.const_data_ptr(), tensor.scalar_type() == torch::headeronly::ScalarType::Long};
}

Cache cache_of(const Tensor& tensor) {
    return {tensor.const_data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

Cache shared_cache_of(const Tensor& tensor) {
    return {tensor.const_data_ptr(), {tensor.stride(0), tensor.stride(0), tensor.stride(1)}};
}

std::tuple<Tensor, Tensor> prefix_attention_decode(const Tensor& q, const Tensor& shared_k, const Tensor& shared_v,
                                                   const Tensor& branch_k, const Tensor& branch_v,
                                                   const Tensor& ranges, const Tensor& branch_lengths, double scale) {
    using torch::headeronly::ScalarType;
    Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
    Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
    Problem problem = {};
    problem.q = values_of(q.const_data_ptr(), dtype_of(q));  // rows of D are multiples of 16 bytes
    problem.shared_k = shared_cache_of(shared_k), problem.shared_v = shared_cache_of(shared_v);
    problem.branch_k = cache_of(branch_k), problem.branch_v = cache_of(branch_v);
    problem.ranges = indices_of(ranges), problem.branch_lengths = indices_of(branch_lengths);
    problem.branches = checked_size("the number of branches", q.size(0));
    problem.queries = checked_size("the number of queries", q.size(1));
    problem.heads = checked_size("the number of heads", q.size(2));
    problem.dim = checked_size("the head dimension", q.size(3));
    checked_size("the number of all ranges", ranges.size(0) * ranges.size(1));
    problem.ranges_of_branch = static_cast<int>(ranges.size(1));
    problem.num_shared = checked_size("the number of shared keys", shared_k.size(0));
    problem.kv_heads = checked_size("the number of key heads", shared_k.size(1));
    problem.branch_capacity = checked_size("the room for a branch's keys", branch_k.size(1));
    const OnDevice run(q);
    Tensor memory;  // torch keeps it until the kernels on this stream are done
    forward({problem, dtype_of(shared_k), scale, out.mutable_data_ptr(),
             static_cast<float*>(lse.mutable_data_ptr()), run.multiprocessors()},
            run, [&](int64_t count) {
                memory = torch::stable::new_empty(q, {count}, ScalarType::Float);
                return static_cast<float*>(memory.mutable_data_ptr());
            });
    return {out, lse};
}

}  // namespace
}  // namespace lynx::decode

STABLE_TORCH_LIBRARY_FRAGMENT(lynx_kernels_cuda, library) {
    library.def(
        "prefix_attention_decode(Tensor q, Tensor shared_k, Tensor shared_v, Tensor branch_k, Tensor branch_v, "
        "Tensor ranges, Tensor branch_lengths, float scale) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lynx_kernels_cuda, CUDA, library) {
    library.impl("prefix_attention_decode", TORCH_BOX(&lynx::decode::prefix_attention_decode));
}
