// What a call of the adapter is, in the terms that the kernels and their callers share. Plain data, pointers and sizes.
#pragma once

#include <cstdint>

namespace lynx {

// Contiguous numbers; null where the argument is absent.
struct Numbers {
    void* data;
    bool is_bfloat16;  // else fp32
};

enum class Activation { kSilu, kRelu, kGelu, kGeluTanh };

struct Adapter {
    int64_t tokens, width, bottleneck;
    float eps;
    Activation activation;
    Numbers x;                       // (tokens, width)
    Numbers norm_weight, norm_bias;  // (width,); no weight, no LayerNorm
    Numbers down_weight, down_bias;  // (bottleneck, width), (bottleneck,)
    Numbers up_weight, up_bias;      // (width, bottleneck), (width,)
    Numbers scale;                   // one number
    Numbers out;                     // (tokens, width)
    float *mean, *rstd;              // (tokens,), written where there is a LayerNorm
    Numbers preactivation;           // (tokens, bottleneck), in the dtype of the weights
    // Operands of the two products, in the type that the instruction set multiplies. Rows end in zeros.
    void *normalized, *activated;
    int64_t normalized_stride, activated_stride;  // in numbers, multiples of kRowMultiple
};

// The adapter's LayerNorm when backward comes back to it. Of the dtypes of x: grad, x_grad; of the products: normalized,
// normalized_grad.
struct LayerNorm {
    int64_t tokens, width;
    Numbers x;                  // (tokens, width)
    const float *mean, *rstd;    // (tokens,)
    const float *weight, *bias;  // (width,); the bias may be null
    Numbers normalized;         // (tokens, width), what `normalize` writes
    Numbers normalized_grad;    // (tokens, width)
    Numbers grad;               // (tokens, width), of the path around the LayerNorm
    Numbers x_grad;             // (tokens, width), or null
    float* sums;                // (blocks, 2, width), zeros to which a block's share of the gradients of weight and
                                 // bias is added, or null
};

constexpr int64_t kSummedTokens = 256;  // of a block

constexpr int64_t kRowMultiple = 64;   // more than any instruction set multiplies at once
constexpr int64_t kBlockColumns = 16;  // of a product's output: what a thread computes at a time

// One instruction set's kernels: forward's three phases, each of a range of tokens or blocks. `next_up_block` is where the
// caller will go on in the next phase; its weights are asked for ahead. And backward's two passes.
struct AdapterKernels {
    void (*normalize)(const Adapter&, int64_t first_token, int64_t last_token);
    void (*down)(const Adapter&, int64_t first_block, int64_t last_block, int64_t next_up_block);
    void (*up)(const Adapter&, int64_t first_block, int64_t last_block);
    void (*renormalize)(const LayerNorm&, int64_t first_token, int64_t last_token);
    void (*norm_backward)(const LayerNorm&, int64_t block);
};

}  // namespace lynx
