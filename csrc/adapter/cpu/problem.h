// What a call of the adapter is, for the kernels and their callers. Plain data, pointers and sizes.
#pragma once

#include <cstdint>

#include "adapter/activations.h"

namespace lynx::adapter {

// Contiguous numbers. `data` is null if the argument is absent.
struct Numbers {
    void* data;
    bool is_bfloat16;  // else fp32
};

struct Problem {
    int64_t tokens, width, bottleneck;
    float eps;
    Activation activation;
    Numbers x;                       // (tokens, width)
    Numbers norm_weight, norm_bias;  // (width,); without a weight there is no LayerNorm
    Numbers down_weight, down_bias;  // (bottleneck, width), (bottleneck,)
    Numbers up_weight, up_bias;      // (width, bottleneck), (width,)
    Numbers scale;                   // one number
    Numbers out;                     // (tokens, width)
    float *mean, *rstd;              // (tokens,), written if there is a LayerNorm
    Numbers preactivation;           // (tokens, bottleneck), in the dtype of the weights
    // Operands of the two products, in the type that the instruction set multiplies. Rows end in zeros.
    void *normalized, *activated;
    int64_t normalized_stride, activated_stride;  // in numbers, multiples of kRowMultiple
};

// The adapter's LayerNorm in backward. grad and x_grad have the dtype of x, normalized and normalized_grad that of the
// products.
struct LayerNorm {
    int64_t tokens, width;
    Numbers x;                   // (tokens, width)
    const float *mean, *rstd;    // (tokens,)
    const float *weight, *bias;  // (width,); the bias may be null
    Numbers normalized;          // (tokens, width), what normalize() writes
    Numbers normalized_grad;     // (tokens, width)
    Numbers grad;                // (tokens, width), of the path around the LayerNorm
    Numbers x_grad;              // (tokens, width), or null
    float* sums;                 // (blocks, 2, width), or null: zeros, to which a block adds its share of the gradients of
                                 // weight and bias
};

constexpr int64_t kSummedTokens = 256;  // of a block
constexpr int64_t kRowMultiple = 64;    // no instruction set multiplies more numbers at once
constexpr int64_t kBlockN = 16;         // columns of a product's output that a thread computes at a time

// The kernels of one instruction set. Forward has three phases, each of a range of tokens or blocks. `next_up_block` is
// where the caller continues in the next phase: its weights are prefetched. Backward has two passes.
struct Kernels {
    void (*normalize)(const Problem&, int64_t first_token, int64_t last_token);
    void (*down)(const Problem&, int64_t first_block, int64_t last_block, int64_t next_up_block);
    void (*up)(const Problem&, int64_t first_block, int64_t last_block);
    void (*renormalize)(const LayerNorm&, int64_t first_token, int64_t last_token);
    void (*norm_backward)(const LayerNorm&, int64_t block);
};

}  // namespace lynx::adapter
