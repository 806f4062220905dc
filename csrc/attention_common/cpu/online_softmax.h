// From scores to the weights of the values, one key tile after another.
//
// The running maximum of a row is only roughly one: it is raised, and what was summed scaled down, where a score
// exceeds it by more than 6. Weights then reach e^6 at most, which costs no precision, and
// after a row's first tile hardly any pays for the maximum across lanes.
#pragma once

#include "matmul.h"

namespace {

constexpr float kSlack = 6;

// Scores of one row become weights; what the row sums up is kept in `total`, and `sums` follows a raised maximum.
template <class Compute>
LYNX_INLINE void weigh(const float* scores, typename Compute::Word* weights, int64_t keys_seen, int64_t keys_computed,
                       float scale, float& row_maximum, float* total, float* sums, int64_t dim) {
    const Floats minus_infinity = broadcast(-__builtin_inff());
    const int64_t whole = keys_seen / kWidth * kWidth;
    const Ints in_last = lane_numbers() < (int32_t)(keys_seen - whole);
    const bool has_last = keys_seen > whole;
    Floats highest = minus_infinity;
    for (int64_t key = 0; key < whole; key += kWidth) highest = maximum(highest, load(scores + key) * scale);
    if (has_last) highest = maximum(highest, in_last ? load(scores + whole) * scale : minus_infinity);
    if (any_greater(highest, broadcast(row_maximum + kSlack))) {
        const float raised = largest(highest);
        if (row_maximum != -__builtin_inff()) {  // until then the sums are 0
            const Floats factor = exp(broadcast(row_maximum - raised));
            store(total, load(total) * factor);
            for (int64_t column = 0; column < dim; column += kWidth) store(sums + column, load(sums + column) * factor);
        }
        row_maximum = raised;
    }
    const Floats shift = broadcast(row_maximum);
    Floats sum = load(total);
    auto put = [&](int64_t key, Floats weight) {
        sum += weight;
        if constexpr (Compute::kNumbers == 1)
            store(weights + key, weight);
        else
            store(reinterpret_cast<BFloat16*>(weights) + key, weight);
    };
    for (int64_t key = 0; key < whole; key += kWidth) put(key, exp(load(scores + key) * scale - shift));
    int64_t key = whole;
    if (has_last) {
        put(key, in_last ? exp(load(scores + key) * scale - shift) : Floats{});
        key += kWidth;
    }
    store(total, sum);
    for (; key < keys_computed; key += kWidth) put(key, Floats{});
}

}  // namespace
