// Which kernels the adapter launches for a few tokens. The caller runs each by `run(Kernel(), args, blocks)`.
#pragma once

#include <algorithm>

#include "common/integers.h"
#include "common/sizes.h"
#include "kernels.h"

namespace lynx::adapter {

// A weight. Its rows are contiguous.
struct Matrix {
    const void* data;
    Dtype dtype;
    int64_t rows, columns, stride;  // the stride in elements
};

struct Call {
    int64_t tokens, width, bottleneck;
    float eps;
    Activation activation;
    Values x;          // (T, d)
    int64_t x_stride;  // of rows, in elements
    Values norm_weight, norm_bias;
    Matrix down;  // (r, d)
    Values down_bias;
    Matrix up;  // (d, r), in the type of `down`
    Values up_bias, scale;
    float *mean, *rstd;               // (T,), if there is a LayerNorm
    void *preactivation, *activated;  // (T, r), in the type of the weights, at multiples of 16 bytes
    void* out;                        // (T, d), in the type of x
    int multiprocessors;
};

// Kernels compute column numbers behind the end of a row, so sizes stay below half of what an int holds.
inline int checked_size(const char* what, int64_t size) { return int_size("adapter", what, size, 30); }

// Whether every row starts and ends at a multiple of 16 bytes.
inline bool is_aligned(const Matrix& matrix) {
    const int64_t items = matrix.dtype == Dtype::kFloat ? 4 : 8;
    return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.stride % items == 0 &&
           matrix.columns % items == 0;
}

// As many blocks as fit on the GPU at once, if there are so many rows. The tiles of tokens share them.
template <class Matmul>
Product product_of(const Matrix& matrix, int64_t tokens, int multiprocessors) {
    const int64_t tiles = divide_up(tokens, Matmul::kBlockM);
    const int64_t fitting = std::max<int64_t>(1, Matmul::kBlocks * multiprocessors / tiles);
    const int64_t blocks = std::min(fitting, matrix.rows), most_rows = divide_up(matrix.rows, blocks);  // of a block
    const int64_t n_tiles = divide_up(most_rows, Matmul::kBlockN);
    Product product = {};
    product.weight = matrix.data;
    product.weight_stride = matrix.stride;
    product.m = checked_size("the number of tokens", tokens);
    product.n = checked_size("a side of a weight", matrix.rows);
    product.k = checked_size("a side of a weight", matrix.columns);
    product.grid_n = static_cast<int>(blocks);
    product.grid_m = static_cast<int>(tiles);
    product.n_tiles = static_cast<int>(n_tiles);
    product.tile_n = static_cast<int>(divide_up(most_rows, n_tiles));
    product.k_tiles = static_cast<int>(divide_up(product.k, Matmul::kBlockK));
    return product;
}

// Calls use(Kernel<Weight, kBlockM, kIsAligned>()). Unaligned weights have one kernel, for any number of tokens.
template <template <class, int, bool> class Kernel, class Weight, class Use>
void with_block_m(int64_t tokens, bool is_aligned, Use use) {
    if (!is_aligned)
        use(Kernel<Weight, 8, false>());
    else if (tokens == 1)
        use(Kernel<Weight, 1, true>());
    else if (tokens <= 4)
        use(Kernel<Weight, 4, true>());
    else
        use(Kernel<Weight, 8, true>());
}

// d and r are not 0.
template <class Run>
void forward(const Call& call, Run&& run) {
    if (call.tokens == 0) return;
    with_type(call.down.dtype, [&](auto weight_type) {
        using Weight = decltype(weight_type);
        auto product = [&](auto kernel, const Matrix& matrix) {
            return product_of<typename decltype(kernel)::Matmul>(matrix, call.tokens, call.multiprocessors);
        };
        auto launch = [&](auto kernel, const typename decltype(kernel)::Args& args) {
            const int64_t blocks = static_cast<int64_t>(args.product.grid_n) * args.product.grid_m;
            run(kernel, args, checked_size("the number of blocks", blocks));
        };
        Weight* activated = static_cast<Weight*>(call.activated);
        with_block_m<SmallMDown, Weight>(call.tokens, is_aligned(call.down), [&](auto kernel) {
            launch(kernel, {product(kernel, call.down), call.x, call.x_stride, call.norm_weight, call.norm_bias,
                            call.down_bias, call.eps, call.activation, call.mean, call.rstd,
                            static_cast<Weight*>(call.preactivation), activated});
        });
        with_block_m<SmallMUp, Weight>(call.tokens, is_aligned(call.up), [&](auto kernel) {
            launch(kernel, {product(kernel, call.up), activated, call.x, call.x_stride, call.up_bias, call.scale,
                            call.out});
        });
    });
}

}  // namespace lynx::adapter
