// What the working memory of a unit is cut into.
#pragma once

#include "common/cutter.h"
#include "pack.h"

namespace {

// The sizes that operands of one problem have, in words and in fp32 numbers.
template <class Compute>
struct Sizes {
    int64_t steps;        // words along head_dim
    int64_t left_stride;  // of a left operand's row
    int64_t stride;       // of a right operand's step over rows, and of a row of sums

    // A cache line more than a power of two, or rows 256 bytes or more apart would share few sets of the L1 cache.
    explicit Sizes(int64_t dim)
        : steps((dim + Compute::kNumbers - 1) / Compute::kNumbers),
          left_stride(round_up(steps, kWidth) + (steps % 64 == 0 ? 16 : 0)),
          stride(round_up(dim, kWidth) + (dim % 64 == 0 ? 16 : 0)) {}

    // Steps of a product over this many rows.
    static int64_t steps_over(int64_t rows) { return (rows + Compute::kNumbers - 1) / Compute::kNumbers; }
};

template <class Element>
Element* head_of(const lynx::Matrix& matrix, int64_t row, int64_t head) {
    return static_cast<Element*>(matrix.data) + row * matrix.row_stride + head * matrix.head_stride;
}

}  // namespace
