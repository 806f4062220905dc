// The online softmax: from scores to the weights of the values, one key tile after another.
//
// The running maximum of a row is not exact. It is raised only where a score exceeds it by more than 6, and what was
// summed is scaled down then. So weights reach e^6 at most, which costs no precision, and after its first tile hardly
// any row needs the maximum across lanes.
#pragma once

#include "matmul.h"

namespace {

constexpr float kSlack = 6;

// The scores of a call with a soft cap: they are scaled, capped, and not scaled again.
inline void cap_scores(float* scores, int64_t rows, int64_t stride, int64_t keys, float scale, float softcap) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t key = 0; key < keys; key += kWidth) {
            float* at = scores + row * stride + key;
            store(at, tanh(load(at) * (scale / softcap)) * softcap);
        }
}

// Turns the scores of one row into weights `p`, of which row_sum gets the sum. If row_max is raised, `acc`, the row's
// sum of values so far, is scaled. The row sees the keys from `keys_unseen`, less than `keys_seen`, up to `keys_seen`;
// the weights of the others, up to `keys_computed`, become 0. If not kLocal, keys_unseen is 0.
template <class Compute, bool kLocal>
LYNX_INLINE void online_softmax(const float* scores, typename Compute::Word* p, int64_t keys_unseen, int64_t keys_seen,
                                int64_t keys_computed, float scale, float& row_max, float* row_sum, float* acc,
                                int64_t dim) {
    const Floats minus_infinity = broadcast(-__builtin_inff());
    const int64_t begin = kLocal ? keys_unseen / kWidth * kWidth : 0;
    const int64_t whole = kLocal ? begin : keys_seen / kWidth * kWidth;  // from here on, lanes are masked
    const auto masked = [&](int64_t key, Floats x, Floats other) {
        Ints seen = lane_numbers() < (int32_t)(keys_seen - key);
        if (kLocal) seen &= lane_numbers() >= (int32_t)(keys_unseen - key);
        return seen ? x : other;
    };
    Floats highest = minus_infinity;
    for (int64_t key = begin; key < whole; key += kWidth) highest = maximum(highest, load(scores + key) * scale);
    for (int64_t key = whole; key < keys_seen; key += kWidth)
        highest = maximum(highest, masked(key, load(scores + key) * scale, minus_infinity));
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
    int64_t key = 0;
    for (; key < begin; key += kWidth) put(key, Floats{});
    for (; key < whole; key += kWidth) put(key, exp(load(scores + key) * scale - shift));
    for (; key < keys_seen; key += kWidth) put(key, masked(key, exp(load(scores + key) * scale - shift), Floats{}));
    store(row_sum, sum);
    for (; key < keys_computed; key += kWidth) put(key, Floats{});
}

}  // namespace
