// The matrix product of attention: c (+)= a b, on packed operands.
//
// Operands are made of 32-bit words. With `Fp32` a word is one fp32 number, and a step along K multiplies one number.
// With `Bf16Pairs` a word is two bf16 numbers, and a step multiplies and adds both (the dot product of AVX512_BF16).
#pragma once

#include "common/vector.h"

namespace {

struct Fp32 {
    typedef float Word;
    static constexpr int64_t kNumbers = 1;  // of a word
    // Steps that are summed in one chain. A chain of a whole tile, 128 steps, costs 5 ulp of the output.
    static constexpr int64_t kChain = 32;
    static LYNX_INLINE void multiply_add(Floats& sum, Word a, Words b) { sum += a * (Floats)b; }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
    typedef uint32_t Word;
    static constexpr int64_t kNumbers = 2;
    static constexpr int64_t kChain = 64;
    static LYNX_INLINE void multiply_add(Floats& sum, Word a, Words b) {
        sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
    }
};
typedef Bf16Pairs Bf16;
#else
typedef Fp32 Bf16;  // bf16 is widened when it is packed
#endif

// a (M, K), or (K, M) if it is transposed; b (K, N); c (M, N) in fp32. K counts words.
template <class Word>
struct Product {
    const Word* a;
    int64_t lda;
    const Word* b;
    int64_t ldb;
    float* c;
    int64_t ldc;
    int64_t k;
    bool accumulate;  // else overwrite
};

template <class Compute, bool kTransposed, int kM, int kVectors>
void matmul_tile(const Product<typename Compute::Word>& product) {
    const auto [a, lda, b, ldb, c, ldc, k, accumulate] = product;
    for (int64_t begin = 0; begin == 0 || begin < k; begin += Compute::kChain) {
        const int64_t end = min(k, begin + Compute::kChain);
        Floats sums[kM][kVectors] = {};
        for (int64_t step = begin; step < end; step++) {
            Words columns[kVectors];
            for (int i = 0; i < kVectors; i++) columns[i] = load_vector<Words>(b + step * ldb + i * kWidth);
            for (int row = 0; row < kM; row++) {
                auto word = kTransposed ? a[step * lda + row] : a[row * lda + step];
                for (int i = 0; i < kVectors; i++) Compute::multiply_add(sums[row][i], word, columns[i]);
            }
        }
        for (int row = 0; row < kM; row++)
            for (int i = 0; i < kVectors; i++) {
                float* to = c + row * ldc + i * kWidth;
                store(to, accumulate || begin > 0 ? load(to) + sums[row][i] : sums[row][i]);
            }
    }
}

template <class Compute, bool kTransposed, int kM>
void matmul_rows(const Product<typename Compute::Word>& product, int64_t vectors) {
    static_assert(kTileVectors == 4 || kTileVectors == 2, "the cases below");
    switch (vectors) {
        case 1: return matmul_tile<Compute, kTransposed, kM, 1>(product);
        case 2: return matmul_tile<Compute, kTransposed, kM, 2>(product);
        case 3: return matmul_tile<Compute, kTransposed, kM, kTileVectors == 4 ? 3 : 1>(product);
        default: return matmul_tile<Compute, kTransposed, kM, kTileVectors>(product);
    }
}

// N is rounded up to whole vectors, so b and c must reach that far.
template <class Compute, bool kTransposed>
void matmul(int64_t m, int64_t n, const Product<typename Compute::Word>& product) {
    const int64_t vectors = divide_up(n, kWidth);
    for (int64_t vector = 0; vector < vectors; vector += kTileVectors) {  // the outer loop: its part of b stays in L1
        for (int64_t row = 0; row < m; row += kTileRows) {
            Product<typename Compute::Word> tile = product;
            tile.a += kTransposed ? row : row * product.lda;
            tile.b += vector * kWidth;
            tile.c += row * product.ldc + vector * kWidth;
            const int64_t tile_vectors = min(vectors - vector, kTileVectors);
            static_assert(kTileRows == 6, "the cases below");
            switch (m - row) {
                case 1: matmul_rows<Compute, kTransposed, 1>(tile, tile_vectors); break;
                case 2: matmul_rows<Compute, kTransposed, 2>(tile, tile_vectors); break;
                case 3: matmul_rows<Compute, kTransposed, 3>(tile, tile_vectors); break;
                case 4: matmul_rows<Compute, kTransposed, 4>(tile, tile_vectors); break;
                case 5: matmul_rows<Compute, kTransposed, 5>(tile, tile_vectors); break;
                default: matmul_rows<Compute, kTransposed, 6>(tile, tile_vectors);
            }
        }
    }
}

}  // namespace
