// Which kernels the adapter for a few tokens takes, for whoever runs them: `run(Kernel(), args, blocks)`.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace lynx::few {

// A weight, its columns side by side.
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
    float *mean, *rstd;              // (T,), where there is a LayerNorm
    void *preactivation, *activated;  // (T, r), in the type of the weights, at multiples of 16 bytes
    void* out;                       // (T, d), in the type of x
    int multiprocessors;
};

inline int narrow_size(const char* what, int64_t size) {
    if (size > std::numeric_limits<int>::max() / 2)  // columns are counted on behind their end
        throw std::invalid_argument(std::string("adapter: ") + what + " is " + std::to_string(size) +
                                    ", and the CUDA kernels take less than 2^30");
    return static_cast<int>(size);
}

// Whether every row starts and ends at a multiple of 16 bytes.
inline bool is_whole(const Matrix& matrix) {
    const int64_t items = matrix.dtype == Dtype::kFloat ? 4 : 8;
    return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.stride % items == 0 &&
           matrix.columns % items == 0;
}

// Blocks that fit on the GPU at once, if there are so many rows; tiles of tokens share them.
template <class Multiply>
Product product_of(const Matrix& matrix, int64_t tokens, int multiprocessors) {
    const int64_t tiles = (tokens + Multiply::kTokens - 1) / Multiply::kTokens;
    const int64_t fitting = std::max<int64_t>(1, Multiply::kBlocks * multiprocessors / tiles);
    const int64_t blocks = std::min(fitting, matrix.rows), most = (matrix.rows - 1) / blocks + 1;
    const int64_t strips = (most - 1) / Multiply::kStrip + 1;
    Product product = {};
    product.weight = matrix.data;
    product.weight_stride = matrix.stride;
    product.tokens = narrow_size("the number of tokens", tokens);
    product.rows = narrow_size("a side of a weight", matrix.rows);
    product.columns = narrow_size("a side of a weight", matrix.columns);
    product.row_blocks = static_cast<int>(blocks);
    product.token_tiles = static_cast<int>(tiles);
    product.strips = static_cast<int>(strips);
    product.strip_rows = static_cast<int>((most - 1) / strips + 1);
    product.chunks = (product.columns - 1) / Multiply::kChunk + 1;
    return product;
}

// Call `use` with the kernel that `Kernel<Weight, tokens, whole>` is for this call. Rows that cannot be read 16 bytes at
// once have one kernel, whatever the tokens.
template <template <class, int, bool> class Kernel, class Weight, class Use>
void with_tile(int64_t tokens, bool whole, Use use) {
    if (!whole)
        use(Kernel<Weight, 8, false>());
    else if (tokens == 1)
        use(Kernel<Weight, 1, true>());
    else if (tokens <= 4)
        use(Kernel<Weight, 4, true>());
    else
        use(Kernel<Weight, 8, true>());
}

// Neither d nor r is 0.
template <class Run>
void adapt(const Call& call, Run&& run) {
    if (call.tokens == 0) return;
    with_type(call.down.dtype, [&](auto weight_type) {
        using Weight = decltype(weight_type);
        auto product = [&](auto kernel, const Matrix& matrix) {
            return product_of<typename decltype(kernel)::Multiply>(matrix, call.tokens, call.multiprocessors);
        };
        auto launch = [&](auto kernel, const typename decltype(kernel)::Args& args) {
            const int64_t blocks = static_cast<int64_t>(args.product.row_blocks) * args.product.token_tiles;
            run(kernel, args, narrow_size("the number of blocks", blocks));
        };
        Weight* activated = static_cast<Weight*>(call.activated);
        with_tile<Down, Weight>(call.tokens, is_whole(call.down), [&](auto kernel) {
            launch(kernel, {product(kernel, call.down), call.x, call.x_stride, call.norm_weight, call.norm_bias,
                            call.down_bias, call.eps, call.activation, call.mean, call.rstd,
                            static_cast<Weight*>(call.preactivation), activated});
        });
        with_tile<Up, Weight>(call.tokens, is_whole(call.up), [&](auto kernel) {
            launch(kernel, {product(kernel, call.up), activated, call.x, call.x_stride, call.up_bias, call.scale,
                            call.out});
        });
    });
}

}  // namespace lynx::few
