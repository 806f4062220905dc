// left (tokens, count) times the transpose of weights (rows, count): every number of the output is an inner product of
// two rows in memory, summed up in the lanes of a vector.
#pragma once

#include "common/vector.h"
#include "adapter/problem.h"

namespace {

// A register tile of kRows rows of weights and up to kTokens tokens: 24 sums, 4 rows and a token in the 32 registers of
// AVX-512; 8, 4 and 1 in the 16 of AVX2 and SSE.
constexpr int kRows = 4, kTokens = kWidth == 16 ? 6 : 2;

// Weights of any dtype become fp32 in registers.
template <class Element>
struct Single {
    typedef Element Weight;
    typedef float Left;
    typedef Floats Vector;
    static constexpr int64_t kStep = kWidth;
    static LYNX_INLINE Vector load_weights(const Weight* from) { return load(from); }
    static LYNX_INLINE Vector load_first_weights(const Weight* from, int64_t count) { return load_first(from, count); }
    static LYNX_INLINE Vector load_left(const Left* from) { return load(from); }
    static LYNX_INLINE void multiply_add(Floats& sum, Vector left, Vector weights) { sum += left * weights; }
};

#if defined(__AVX512BF16__)
// bf16 numbers two a lane.
struct Pairs {
    typedef BFloat16 Weight;
    typedef BFloat16 Left;
    typedef Words Vector;
    static constexpr int64_t kStep = 2 * kWidth;
    static LYNX_INLINE Vector load_weights(const Weight* from) { return load_vector<Words>(from); }
    static LYNX_INLINE Vector load_first_weights(const Weight* from, int64_t count) {
        Weight staged[kStep] = {};
        memcpy(staged, from, count * sizeof(Weight));
        return load_weights(staged);
    }
    static LYNX_INLINE Vector load_left(const Left* from) { return load_vector<Words>(from); }
    static LYNX_INLINE void multiply_add(Floats& sum, Vector left, Vector weights) {
        sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)weights);
    }
};
#endif

// Memory that will be read next, asked for in steps while something else is computed.
struct Ahead {
    const char* next;
    const char* end;
    int64_t lines;  // a step

    LYNX_INLINE void ask() {
        for (int64_t i = 0; i < lines && next < end; i++, next += 64) __builtin_prefetch(next, 0, 2);
    }
};

template <class Compute>
struct Product {
    const typename Compute::Left* left;
    int64_t left_stride;  // rows are 0 from `count` on
    const typename Compute::Weight* weights;
    int64_t tokens, rows, count;

    // The block's weights and what is behind them.
    const char* block(int64_t block) const {
        const int64_t row = block * lynx::kBlockColumns;
        return reinterpret_cast<const char*>(weights + (row < rows ? row : rows) * count);
    }
};

// Of kRows rows from `row` on and kCount tokens from `token` on, the sums' lanes: (kCount, kBlockColumns, kWidth).
template <class Compute, int kCount>
void multiply_tile(const Product<Compute>& product, int64_t token, int64_t row, float* lanes, Ahead& ahead) {
    const auto [left, left_stride, weights, tokens, rows, count] = product;
    const typename Compute::Weight* from[kRows];
    for (int i = 0; i < kRows; i++) from[i] = weights + (row + i < rows ? row + i : rows - 1) * count;
    const typename Compute::Left* x = left + token * left_stride;
    Floats sums[kRows][kCount];
    for (int i = 0; i < kRows; i++)
        for (int t = 0; t < kCount; t++) sums[i][t] = Floats{};
    typename Compute::Vector words[kRows];
    const int64_t whole = count / Compute::kStep * Compute::kStep;
    for (int64_t k = 0; k < whole; k += Compute::kStep) {
        ahead.ask();
        for (int i = 0; i < kRows; i++) words[i] = Compute::load_weights(from[i] + k);
        for (int t = 0; t < kCount; t++) {
            const auto numbers = Compute::load_left(x + t * left_stride + k);
            for (int i = 0; i < kRows; i++) Compute::multiply_add(sums[i][t], numbers, words[i]);
        }
    }
    if (whole < count) {
        for (int i = 0; i < kRows; i++) words[i] = Compute::load_first_weights(from[i] + whole, count - whole);
        for (int t = 0; t < kCount; t++) {
            const auto numbers = Compute::load_left(x + t * left_stride + whole);
            for (int i = 0; i < kRows; i++) Compute::multiply_add(sums[i][t], numbers, words[i]);
        }
    }
    for (int t = 0; t < kCount; t++)
        for (int i = 0; i < kRows; i++) store(lanes + (t * lynx::kBlockColumns + i) * kWidth, sums[i][t]);
}

template <class Compute, int kCount = kTokens>
LYNX_INLINE void multiply_tokens(int64_t tokens, const Product<Compute>& product, int64_t token, int64_t row,
                                 float* lanes, Ahead& ahead) {
    if constexpr (kCount > 1)
        if (tokens < kCount)
            return multiply_tokens<Compute, kCount - 1>(tokens, product, token, row, lanes, ahead);
    multiply_tile<Compute, kCount>(product, token, row, lanes, ahead);
}

// `finish(token, column, sums, columns)` is called for every vector of a token's columns, `columns` of which count.
template <class Compute, class Finish>
LYNX_INLINE void multiply_block(const Product<Compute>& product, int64_t block, const char* next, const char* next_end,
                                Finish finish) {
    alignas(64) float lanes[kTokens * lynx::kBlockColumns * kWidth];
    const int64_t first = block * lynx::kBlockColumns;
    const int64_t tiles = (product.tokens + kTokens - 1) / kTokens;
    const int64_t steps = tiles * (lynx::kBlockColumns / kRows) * (product.count / Compute::kStep) + 1;
    Ahead ahead = {next, next_end, (next_end - next) / 64 / steps + 1};
    for (int64_t token = 0; token < product.tokens; token += kTokens) {
        const int64_t tokens = product.tokens - token < kTokens ? product.tokens - token : kTokens;
        for (int64_t row = 0; row < lynx::kBlockColumns && first + row < product.rows; row += kRows)
            multiply_tokens(tokens, product, token, first + row, lanes + row * kWidth, ahead);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t column = 0; column < lynx::kBlockColumns && first + column < product.rows; column += kWidth)
                finish(token + t, first + column, sums_of_rows(lanes + (t * lynx::kBlockColumns + column) * kWidth),
                       product.rows - first - column);
    }
}

}  // namespace
