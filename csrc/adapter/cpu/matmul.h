// c (M, N) = a (M, K) times the transpose of the weights (N, K), for few tokens M. Every number of c is the inner
// product of two rows in memory, summed in the lanes of a vector.
#pragma once

#include "common/vector.h"
#include "problem.h"

namespace {

using namespace lynx::adapter;

// A register tile of kTileN rows of weights and up to kTileM tokens. With AVX-512, 24 sums, 4 rows and a token fit the
// 32 registers; with AVX2 and SSE, 8 sums, 4 rows and a token fit the 16.
constexpr int kTileN = 4, kTileM = kWidth == 16 ? 6 : 2;

// Weights of any dtype become fp32 in registers.
template <class Element>
struct Fp32 {
    typedef Element Weight;
    typedef float Input;
    typedef Floats Vector;
    static constexpr int64_t kStep = kWidth;
    static LYNX_INLINE Vector load_weights(const Weight* from) { return load(from); }
    static LYNX_INLINE Vector load_first_weights(const Weight* from, int64_t count) { return load_first(from, count); }
    static LYNX_INLINE Vector load_input(const Input* from) { return load(from); }
    static LYNX_INLINE void multiply_add(Floats& sum, Vector input, Vector weights) { sum += input * weights; }
};

#if defined(__AVX512BF16__)
// Two bf16 numbers a lane.
struct Bf16Pairs {
    typedef BFloat16 Weight;
    typedef BFloat16 Input;
    typedef Words Vector;
    static constexpr int64_t kStep = 2 * kWidth;
    static LYNX_INLINE Vector load_weights(const Weight* from) { return load_vector<Words>(from); }
    static LYNX_INLINE Vector load_first_weights(const Weight* from, int64_t count) {
        Weight staged[kStep] = {};
        memcpy(staged, from, count * sizeof(Weight));
        return load_weights(staged);
    }
    static LYNX_INLINE Vector load_input(const Input* from) { return load_vector<Words>(from); }
    static LYNX_INLINE void multiply_add(Floats& sum, Vector input, Vector weights) {
        sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)input, (__m512bh)weights);
    }
};
#endif

// Prefetches memory that is read next, in steps, while something else is computed.
struct Prefetcher {
    const char* next;
    const char* end;
    int64_t lines;  // of a step

    LYNX_INLINE void step() {
        for (int64_t i = 0; i < lines && next < end; i++, next += 64) __builtin_prefetch(next, 0, 2);
    }
};

template <class Compute>
struct Product {
    const typename Compute::Input* a;
    int64_t lda;  // rows are 0 from K on
    const typename Compute::Weight* weights;
    int64_t m, n, k;

    // The first weight of a block, and so the end of the block before it.
    const char* block(int64_t block) const {
        return reinterpret_cast<const char*>(weights + min(block * kBlockN, n) * k);
    }
};

// The lanes of the sums of kTileN rows of weights from `row` on, and kM tokens from `token` on: (kM, kBlockN, kWidth).
template <class Compute, int kM>
void matmul_tile(const Product<Compute>& product, int64_t token, int64_t row, float* lanes, Prefetcher& prefetcher) {
    const auto [a, lda, weights, m, n, k] = product;
    const typename Compute::Weight* from[kTileN];
    for (int i = 0; i < kTileN; i++) from[i] = weights + (row + i < n ? row + i : n - 1) * k;
    const typename Compute::Input* x = a + token * lda;
    Floats sums[kTileN][kM];
    for (int i = 0; i < kTileN; i++)
        for (int t = 0; t < kM; t++) sums[i][t] = Floats{};
    typename Compute::Vector words[kTileN];
    const int64_t whole = k / Compute::kStep * Compute::kStep;
    for (int64_t at = 0; at < whole; at += Compute::kStep) {
        prefetcher.step();
        for (int i = 0; i < kTileN; i++) words[i] = Compute::load_weights(from[i] + at);
        for (int t = 0; t < kM; t++) {
            const auto numbers = Compute::load_input(x + t * lda + at);
            for (int i = 0; i < kTileN; i++) Compute::multiply_add(sums[i][t], numbers, words[i]);
        }
    }
    if (whole < k) {
        for (int i = 0; i < kTileN; i++) words[i] = Compute::load_first_weights(from[i] + whole, k - whole);
        for (int t = 0; t < kM; t++) {
            const auto numbers = Compute::load_input(x + t * lda + whole);
            for (int i = 0; i < kTileN; i++) Compute::multiply_add(sums[i][t], numbers, words[i]);
        }
    }
    for (int t = 0; t < kM; t++)
        for (int i = 0; i < kTileN; i++) store(lanes + (t * kBlockN + i) * kWidth, sums[i][t]);
}

template <class Compute, int kM = kTileM>
LYNX_INLINE void matmul_tokens(int64_t tokens, const Product<Compute>& product, int64_t token, int64_t row,
                               float* lanes, Prefetcher& prefetcher) {
    if constexpr (kM > 1)
        if (tokens < kM) return matmul_tokens<Compute, kM - 1>(tokens, product, token, row, lanes, prefetcher);
    matmul_tile<Compute, kM>(product, token, row, lanes, prefetcher);
}

// Calls finish(token, column, sums, columns) for every vector of a token's columns. The first `columns` of them exist.
// The memory from `next` to `next_end` is prefetched.
template <class Compute, class Finish>
LYNX_INLINE void matmul_block(const Product<Compute>& product, int64_t block, const char* next, const char* next_end,
                              Finish finish) {
    alignas(64) float lanes[kTileM * kBlockN * kWidth];
    const int64_t first = block * kBlockN;
    const int64_t tiles = divide_up(product.m, kTileM);
    const int64_t steps = tiles * (kBlockN / kTileN) * (product.k / Compute::kStep) + 1;
    Prefetcher prefetcher = {next, next_end, (next_end - next) / 64 / steps + 1};
    for (int64_t token = 0; token < product.m; token += kTileM) {
        const int64_t tokens = min(product.m - token, kTileM);
        for (int64_t row = 0; row < kBlockN && first + row < product.n; row += kTileN)
            matmul_tokens(tokens, product, token, first + row, lanes + row * kWidth, prefetcher);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t column = 0; column < kBlockN && first + column < product.n; column += kWidth)
                finish(token + t, first + column, sums_of_rows(lanes + (t * kBlockN + column) * kWidth),
                       product.n - first - column);
    }
}

}  // namespace
