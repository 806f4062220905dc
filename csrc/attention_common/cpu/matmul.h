// The one matrix product under all of attention: out (+)= left * right, on packed operands.
//
// Operands are made of 32-bit words. With `Single` a word is one fp32 number and a step of the product; with `Pairs` it
// is two bf16 numbers, and a step multiplies and adds both (AVX512_BF16's dot product).
#pragma once

#include "common/vector.h"

namespace {

struct Single {
    typedef float Word;
    static constexpr int64_t kNumbers = 1;  // a word
    // Steps that are summed up in one chain. A chain of a whole tile, 128, loses 5 last places of the output.
    static constexpr int64_t kChain = 32;
    static LYNX_INLINE void multiply_add(Floats& sum, Word left, Words right) { sum += left * (Floats)right; }
};

#if defined(__AVX512BF16__)
struct Pairs {
    typedef uint32_t Word;
    static constexpr int64_t kNumbers = 2;
    static constexpr int64_t kChain = 64;
    static LYNX_INLINE void multiply_add(Floats& sum, Word left, Words right) {
        sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)left), (__m512bh)right);
    }
};
#endif

// out (rows, columns) fp32, left (rows, steps) or, if transposed, (steps, rows); right (steps, columns).
template <class Word>
struct Product {
    const Word* left;
    int64_t left_stride;
    const Word* right;
    int64_t right_stride;
    float* out;
    int64_t out_stride;
    int64_t steps;
    bool accumulate;  // else overwrite
};

template <class Compute, bool kLeftIsTransposed, int kRows, int kVectors>
void multiply_tile(const Product<typename Compute::Word>& product) {
    const auto [left, left_stride, right, right_stride, out, out_stride, steps, accumulate] = product;
    for (int64_t begin = 0; begin == 0 || begin < steps; begin += Compute::kChain) {
        const int64_t end = steps < begin + Compute::kChain ? steps : begin + Compute::kChain;
        Floats sums[kRows][kVectors] = {};
        for (int64_t step = begin; step < end; step++) {
            Words columns[kVectors];
            for (int i = 0; i < kVectors; i++)
                columns[i] = load_vector<Words>(right + step * right_stride + i * kWidth);
            for (int row = 0; row < kRows; row++) {
                auto word = kLeftIsTransposed ? left[step * left_stride + row] : left[row * left_stride + step];
                for (int i = 0; i < kVectors; i++) Compute::multiply_add(sums[row][i], word, columns[i]);
            }
        }
        for (int row = 0; row < kRows; row++)
            for (int i = 0; i < kVectors; i++) {
                float* to = out + row * out_stride + i * kWidth;
                store(to, accumulate || begin > 0 ? load(to) + sums[row][i] : sums[row][i]);
            }
    }
}

template <class Compute, bool kLeftIsTransposed, int kRows>
void multiply_rows(const Product<typename Compute::Word>& product, int64_t vectors) {
    static_assert(kTileVectors == 4 || kTileVectors == 2, "the cases below");
    switch (vectors) {
        case 1: return multiply_tile<Compute, kLeftIsTransposed, kRows, 1>(product);
        case 2: return multiply_tile<Compute, kLeftIsTransposed, kRows, 2>(product);
        case 3: return multiply_tile<Compute, kLeftIsTransposed, kRows, kTileVectors == 4 ? 3 : 1>(product);
        default: return multiply_tile<Compute, kLeftIsTransposed, kRows, kTileVectors>(product);
    }
}

// `columns` is rounded up to whole vectors: the operands must reach that far.
template <class Compute, bool kLeftIsTransposed>
void multiply(int64_t rows, int64_t columns, const Product<typename Compute::Word>& product) {
    const int64_t vectors = (columns + kWidth - 1) / kWidth;
    for (int64_t vector = 0; vector < vectors; vector += kTileVectors) {  // outside: its part of `right` stays in L1
        for (int64_t row = 0; row < rows; row += kTileRows) {
            Product<typename Compute::Word> part = product;
            part.left += kLeftIsTransposed ? row : row * product.left_stride;
            part.right += vector * kWidth;
            part.out += row * product.out_stride + vector * kWidth;
            const int64_t some_vectors = vectors - vector < kTileVectors ? vectors - vector : kTileVectors;
            static_assert(kTileRows == 6, "the cases below");
            switch (rows - row) {
                case 1: multiply_rows<Compute, kLeftIsTransposed, 1>(part, some_vectors); break;
                case 2: multiply_rows<Compute, kLeftIsTransposed, 2>(part, some_vectors); break;
                case 3: multiply_rows<Compute, kLeftIsTransposed, 3>(part, some_vectors); break;
                case 4: multiply_rows<Compute, kLeftIsTransposed, 4>(part, some_vectors); break;
                case 5: multiply_rows<Compute, kLeftIsTransposed, 5>(part, some_vectors); break;
                default: multiply_rows<Compute, kLeftIsTransposed, 6>(part, some_vectors);
            }
        }
    }
}

}  // namespace
