// Loads and stores of numbers whose dtype is known only when the kernel runs, a vector at a time.
#pragma once

#include "common/vector.h"
#include "problem.h"

namespace {

LYNX_INLINE Floats load_first(const lynx::adapter::Numbers& numbers, int64_t index, int64_t count) {
    return numbers.is_bfloat16 ? load_first(static_cast<const BFloat16*>(numbers.data) + index, count)
                               : load_first(static_cast<const float*>(numbers.data) + index, count);
}

LYNX_INLINE void store_first(const lynx::adapter::Numbers& numbers, int64_t index, Floats values, int64_t count) {
    if (numbers.is_bfloat16)
        store_first(static_cast<BFloat16*>(numbers.data) + index, values, count);
    else
        store_first(static_cast<float*>(numbers.data) + index, values, count);
}

}  // namespace
