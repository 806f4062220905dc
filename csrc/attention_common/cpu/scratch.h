// The sizes of packed operands in the scratch memory of a task.
#pragma once

#include "common/workspace.h"
#include "pack.h"
#include "problem.h"

namespace {

// Of operands of one head dimension (that of keys, or that of values), in words of Compute; strides of sums in fp32 numbers.
template <class Compute>
struct Sizes {
    int64_t words;  // along head_dim
    int64_t lda;    // of rows of q, k, v and dout as operand a
    int64_t ldb;    // of them as operand b, and of rows of sums

    // A cache line is added to strides that are powers of two: rows 256 bytes or more apart would share few sets of the
    // L1 cache.
    explicit Sizes(int64_t dim)
        : words(divide_up(dim, Compute::kNumbers)),
          lda(round_up(words, kWidth) + (words % 64 == 0 ? 16 : 0)),
          ldb(round_up(dim, kWidth) + (dim % 64 == 0 ? 16 : 0)) {}

    // K of a product over this many rows.
    static int64_t k_over(int64_t rows) { return divide_up(rows, Compute::kNumbers); }
};

// A tile of keys and values, and the products of a block of queries with it.
template <class Compute>
struct TileScratch {
    typedef typename Compute::Word Word;
    Word* keys;     // (words, block_n): k^T
    Word* values;   // (words over block_n, ldb)
    float* scores;  // (block_m, block_n)
    Word* p;        // (block_m, block_n in words); in fp32 it replaces the scores

    TileScratch(Workspace& workspace, int64_t block_m, int64_t block_n, const Sizes<Compute>& sizes,
                const Sizes<Compute>& value_sizes) {
        keys = workspace.take<Word>(sizes.words * block_n);
        values = workspace.take<Word>(sizes.k_over(block_n) * value_sizes.ldb);
        scores = workspace.take<float>(block_m * block_n);
        p = Compute::kNumbers == 1 ? reinterpret_cast<Word*>(scores)
                                   : workspace.take<Word>(block_m * block_n / Compute::kNumbers);
    }
};

template <class Element>
Element* head_of(const lynx::attention::Matrix& matrix, int64_t row, int64_t head) {
    return static_cast<Element*>(matrix.data) + row * matrix.row_stride + head * matrix.head_stride;
}

// The keys or values of a tile, of one key head.
template <class Element>
Rows<Element> rows_of_tile(const lynx::attention::Matrix& matrix, const lynx::attention::Tile& tile, int64_t kv_head,
                           int64_t dim) {
    return {head_of<Element>(matrix, tile.begin, kv_head), matrix.row_stride, tile.end - tile.begin, dim};
}

}  // namespace
