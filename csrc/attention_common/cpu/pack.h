// Rows of q, k, v and dout, (rows, head_dim) with any row stride, as packed operands of matmul.h. Zeros fill up what is
// behind head_dim and behind the last row.
#pragma once

#include "common/workspace.h"
#include "matmul.h"

namespace {

template <class Element>
struct Rows {
    const Element* first;
    int64_t stride;
    int64_t count;
    int64_t dim;

    // The rows from `row` on, at most `limit` of them.
    LYNX_INLINE Rows slice(int64_t row, int64_t limit) const {
        return {first + row * stride, stride, min(limit, count - row), dim};
    }

    // kWidth words of `row` from `word` on, all of which exist.
    template <class Compute>
    LYNX_INLINE Words whole_words(int64_t row, int64_t word) const {
        const Element* from = first + row * stride + word * Compute::kNumbers;
        if constexpr (Compute::kNumbers == 1)
            return (Words)load(from);
        else
            return load_vector<Words>(from);
    }

    // Likewise, but some of them may not exist.
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

// As operand a, (rows, words along head_dim). `lda` is at least the words of a row, rounded up to vectors.
template <class Compute, class Element>
void pack_a(const Rows<Element>& rows, typename Compute::Word* out, int64_t lda) {
    const int64_t whole = rows.dim / (kWidth * Compute::kNumbers) * kWidth;
    for (int64_t row = 0; row < rows.count; row++) {
        for (int64_t word = 0; word < whole; word += kWidth)
            store_vector(out + row * lda + word, rows.template whole_words<Compute>(row, word));
        if (whole * Compute::kNumbers < rows.dim)
            store_vector(out + row * lda + whole, rows.template words<Compute>(row, whole));
    }
}

// As operand b of a product over rows, (words over rows, head_dim). `ldb` is at least head_dim, rounded up to vectors.
template <class Compute, class Element>
void pack_b(const Rows<Element>& rows, typename Compute::Word* out, int64_t ldb) {
    if constexpr (Compute::kNumbers == 1) {
        pack_a<Compute>(rows, out, ldb);
    } else {
        for (int64_t row = 0; row < rows.count; row += 2)
            for (int64_t column = 0; column < rows.dim; column += kWidth) {
                // bf16 stands in the upper halves, so nothing is rounded.
                Words even = (Words)rows.numbers(row, column), odd = (Words)rows.numbers(row + 1, column);
                store_vector(out + row / 2 * ldb + column, even >> 16 | odd);
            }
    }
}

// As operand b of a product over head_dim, (words along head_dim, rows). `ldb` is at least the rows, rounded up to
// vectors.
template <class Compute, class Element>
void pack_b_transposed(const Rows<Element>& rows, typename Compute::Word* out, int64_t ldb) {
    const int64_t words = divide_up(rows.dim, Compute::kNumbers);
    for (int64_t word = 0; word < words; word += kWidth)
        for (int64_t row = 0; row < rows.count; row += kWidth) {
            Words block[kWidth];
            if (row + kWidth <= rows.count && (word + kWidth) * Compute::kNumbers <= rows.dim) {
                for (int i = 0; i < kWidth; i++) block[i] = rows.template whole_words<Compute>(row + i, word);
                transpose(block);
                for (int i = 0; i < kWidth; i++) store_vector(out + (word + i) * ldb + row, block[i]);
                continue;
            }
            for (int i = 0; i < kWidth; i++) block[i] = rows.template words<Compute>(row + i, word);
            transpose(block);
            for (int i = 0; i < min(kWidth, words - word); i++)
                store_vector(out + (word + i) * ldb + row, block[i]);
        }
}

}  // namespace
