// The attention kernels of one instruction set. Compiled once for each, with LYNX_KERNELS the name of the result.
#include "backward.h"

namespace {

#if defined(__AVX512BF16__)
typedef Pairs BFloat16Compute;
#else
typedef Single BFloat16Compute;  // widened when packed
#endif

size_t any_forward_scratch_bytes(const lynx::Problem& problem, const lynx::Unit& unit) {
    return problem.is_bfloat16 ? forward_scratch_bytes<BFloat16Compute>(problem, unit)
                               : forward_scratch_bytes<Single>(problem, unit);
}

void any_forward(const lynx::Problem& problem, const lynx::Unit& unit, int64_t kv_head, void* scratch) {
    if (problem.is_bfloat16)
        forward<BFloat16Compute, BFloat16>(problem, unit, kv_head, scratch);
    else
        forward<Single, float>(problem, unit, kv_head, scratch);
}

size_t any_backward_scratch_bytes(const lynx::Problem& problem, const lynx::Unit& unit) {
    return problem.is_bfloat16 ? backward_scratch_bytes<BFloat16Compute>(problem, unit)
                               : backward_scratch_bytes<Single>(problem, unit);
}

void any_backward(const lynx::Problem& problem, const lynx::Unit& unit, int64_t kv_head, void* scratch) {
    if (problem.is_bfloat16)
        backward<BFloat16Compute, BFloat16>(problem, unit, kv_head, scratch);
    else
        backward<Single, float>(problem, unit, kv_head, scratch);
}

}  // namespace

namespace lynx {

extern const Kernels LYNX_KERNELS = {any_forward_scratch_bytes, any_forward, any_backward_scratch_bytes, any_backward};

}  // namespace lynx
