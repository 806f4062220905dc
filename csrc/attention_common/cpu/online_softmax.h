// The online softmax: from scores to the weights of the values, one key tile after another.
//
// The running maximum of a row is not exact. It is raised only where a score exceeds it by more than 6, and what was
// summed is scaled down then. So weights reach e^6 at most, which costs no precision, and after its first tile hardly
// any row needs the maximum across lanes.
#pragma once

#include "matmul.h"

namespace {

constexpr float kSlack = 6;

// Turns the scores of one row into weights `p`, of which row_sum gets the sum. If row_max is raised, `acc`, the row's
// sum of values so far, is scaled. The row sees `keys_seen` keys; the weights of the others, up to `keys_computed`,
// become 0.
template <class Compute>
LYNX_INLINE void online_softmax(const float* scores, typename Compute::Word* p, int64_t keys_seen,
                                int64_t keys_computed, float scale, float& row_max, float* row_sum, float* acc,
                                int64_t dim) {
    const Floats minus_infinity = broadcast(-__builtin_inff());
    const int64_t whole = keys_seen / kWidth * kWidth;
    const Ints in_last = lane_numbers() < (int32_t)(keys_seen - whole);
    const bool has_last = keys_seen > whole;
    Floats highest = minus_infinity;
    for (int64_t key = 0; key < whole; key += kWidth) highest = maximum(highest, load(scores + key) * scale);
    if (has_last) highest = maximum(highest, in_last ? load(scores + whole) * scale : minus_infinity);
    if (any_greater(highest, broadcast(row_max + kSlack))) {
        const float raised = max_of_lanes(highest);
        if (row_max != -__builtin_inff()) {  // until then the sums are 0
            const Floats factor = exp(broadcast(row_max - raised));
            store(row_sum, load(row_sum) * factor);
            for (int64_t column = 0; column < dim; column += kWidth) store(acc + column, load(acc + column) * factor);
        }
        row_max = raised;
    }
    const Floats shift = broadcast(row_max);
    Floats sum = load(row_sum);
    auto put = [&](int64_t key, Floats weight) {
        sum += weight;
        if constexpr (Compute::kNumbers == 1)
            store(p + key, weight);
        else
            store(reinterpret_cast<BFloat16*>(p) + key, weight);
    };
    for (int64_t key = 0; key < whole; key += kWidth) put(key, exp(load(scores + key) * scale - shift));
    int64_t key = whole;
    if (has_last) {
        put(key, in_last ? exp(load(scores + key) * scale - shift) : Floats{});
        key += kWidth;
    }
    store(row_sum, sum);
    for (; key < keys_computed; key += kWidth) put(key, Floats{});
}

}  // namespace
