// Rows of q, k, v and of the gradient, (rows, head_dim) with any row stride, as operands of matmul.h's product. What is
// behind head_dim, and behind the last row, is 0.
#pragma once

#include "common/cutter.h"
#include "matmul.h"

namespace {

template <class Element>
struct Rows {
    const Element* first;
    int64_t stride;
    int64_t count;
    int64_t dim;

    // Up to `most` of the rows from `row` on.
    LYNX_INLINE Rows part(int64_t row, int64_t most) const {
        return {first + row * stride, stride, smaller(most, count - row), dim};
    }

    // kWidth words of `row` from `word` on; all of them are there.
    template <class Compute>
    LYNX_INLINE Words whole_words(int64_t row, int64_t word) const {
        const Element* from = first + row * stride + word * Compute::kNumbers;
        if constexpr (Compute::kNumbers == 1)
            return (Words)load(from);
        else
            return load_vector<Words>(from);
    }

    // Likewise where some may not be.
    template <class Compute>
    LYNX_INLINE Words words(int64_t row, int64_t word) const {
        if (row >= count) return Words{};
        const int64_t begin = word * Compute::kNumbers;
        const Element* from = first + row * stride + begin;
        if constexpr (Compute::kNumbers == 1) {
            return (Words)load_first(from, dim - begin);
        } else {
            if (dim - begin >= 2 * kWidth) return load_vector<Words>(from);
            Element staged[2 * kWidth] = {};
            memcpy(staged, from, (dim - begin) * sizeof(Element));
            return load_vector<Words>(staged);
        }
    }

    // kWidth numbers of `row` from `column` on.
    LYNX_INLINE Floats numbers(int64_t row, int64_t column) const {
        return row < count ? load_first(first + row * stride + column, dim - column) : Floats{};
    }
};

// The left operand: a row's words along head_dim. `stride` >= the words of a row, rounded up to vectors.
template <class Compute, class Element>
void pack_left(const Rows<Element>& rows, typename Compute::Word* out, int64_t stride) {
    for (int64_t row = 0; row < rows.count; row++)
        for (int64_t word = 0; word * Compute::kNumbers < rows.dim; word += kWidth)
            store_vector(out + row * stride + word, rows.template words<Compute>(row, word));
}

// The right operand whose steps are rows: word (step, column). `stride` >= head_dim, rounded up to vectors.
template <class Compute, class Element>
void pack_right(const Rows<Element>& rows, typename Compute::Word* out, int64_t stride) {
    if constexpr (Compute::kNumbers == 1) {
        pack_left<Compute>(rows, out, stride);
    } else {
        for (int64_t row = 0; row < rows.count; row += 2)
            for (int64_t column = 0; column < rows.dim; column += kWidth) {
                // bf16 numbers in the upper halves: nothing is rounded
                Words even = (Words)rows.numbers(row, column), odd = (Words)rows.numbers(row + 1, column);
                store_vector(out + row / 2 * stride + column, even >> 16 | odd);
            }
    }
}

// The right operand whose steps run along head_dim: word (step, row). `stride` >= the rows, rounded up to vectors.
template <class Compute, class Element>
void pack_transposed(const Rows<Element>& rows, typename Compute::Word* out, int64_t stride) {
    const int64_t words = (rows.dim + Compute::kNumbers - 1) / Compute::kNumbers;
    for (int64_t word = 0; word < words; word += kWidth)
        for (int64_t row = 0; row < rows.count; row += kWidth) {
            Words block[kWidth];
            if (row + kWidth <= rows.count && (word + kWidth) * Compute::kNumbers <= rows.dim) {  // the most: quickly
                for (int i = 0; i < kWidth; i++) block[i] = rows.template whole_words<Compute>(row + i, word);
                transpose(block);
                for (int i = 0; i < kWidth; i++) store_vector(out + (word + i) * stride + row, block[i]);
                continue;
            }
            for (int i = 0; i < kWidth; i++) block[i] = rows.template words<Compute>(row + i, word);
            transpose(block);
            for (int i = 0; i < smaller(kWidth, words - word); i++)
                store_vector(out + (word + i) * stride + row, block[i]);
        }
}

}  // namespace
