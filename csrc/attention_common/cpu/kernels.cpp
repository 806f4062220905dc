// The attention kernels of one instruction set. This file is compiled once for each, and LYNX_KERNELS names the result.
#include "backward.h"

namespace {

// Calls use(compute, element) with values of the two types, which stand for them.
template <class Use>
LYNX_INLINE auto with_types(const Problem& problem, Use use) {
    return problem.is_bfloat16 ? use(Bf16(), BFloat16()) : use(Fp32(), float());
}

size_t forward_bytes(const Problem& problem, const Task& task) {
    return with_types(problem, [&](auto compute, auto) {
        return forward_scratch_bytes<decltype(compute)>(problem, task);
    });
}

void forward(const Problem& problem, const Task& task, int64_t kv_head, void* scratch) {
    with_types(problem, [&](auto compute, auto element) {
        forward_task<decltype(compute), decltype(element)>(problem, task, kv_head, scratch);
    });
}

size_t backward_bytes(const Problem& problem, const Task& task) {
    return with_types(problem, [&](auto compute, auto) {
        return backward_scratch_bytes<decltype(compute)>(problem, task);
    });
}

void backward(const Problem& problem, const Task& task, int64_t kv_head, void* scratch) {
    with_types(problem, [&](auto compute, auto element) {
        backward_task<decltype(compute), decltype(element)>(problem, task, kv_head, scratch);
    });
}

}  // namespace

namespace lynx::attention {

extern const Kernels LYNX_KERNELS = {forward_bytes, forward, backward_bytes, backward};

}  // namespace lynx::attention
