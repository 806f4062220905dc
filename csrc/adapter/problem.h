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

constexpr int64_t kRowMultiple = 64;   // more than any instruction set multiplies at once
constexpr int64_t kBlockColumns = 16;  // of a product's output: what a thread computes at a time

// One instruction set's kernels: the three phases, each of a range of tokens or blocks. `next_up_block` is where the
// caller will go on in the next phase; its weights are asked for ahead.
struct AdapterKernels {
    void (*normalize)(const Adapter&, int64_t first_token, int64_t last_token);
    void (*down)(const Adapter&, int64_t first_block, int64_t last_block, int64_t next_up_block);
    void (*up)(const Adapter&, int64_t first_block, int64_t last_block);
};

}  // namespace lynx
