// The adapter's kernels of one instruction set. This file is compiled once for each, and LYNX_KERNELS names the result.
#include "adapter/activations.h"
#include "layer_norm.h"
#include "load.h"
#include "matmul.h"

namespace {

#if defined(__AVX512BF16__)
typedef Bf16Pairs Bf16Compute;
#else
typedef Fp32<BFloat16> Bf16Compute;
#endif
typedef Fp32<float> Fp32Compute;

// Calls function(column, x, columns) for every vector of a token's row. Its first `columns` numbers exist, the rest are
// 0.
template <class Function>
LYNX_INLINE void for_row(const Problem& problem, int64_t token, Function function) {
    for (int64_t column = 0; column < problem.width; column += kWidth)
        function(column, load_first(problem.x, token * problem.width + column, problem.width - column),
                 problem.width - column);
}

// Writes the input of the down-projection: the LayerNorm's output, or x.
template <class Compute>
void normalize(const Problem& problem, int64_t first_token, int64_t last_token) {
    typedef typename Compute::Input Input;
    const int64_t width = problem.width, bottleneck = problem.bottleneck;
    for (int64_t token = first_token; token < last_token; token++) {
        Input* out = static_cast<Input*>(problem.normalized) + token * problem.normalized_stride;
        Input* activated = static_cast<Input*>(problem.activated) + token * problem.activated_stride;
        memset(out + width, 0, (problem.normalized_stride - width) * sizeof(Input));
        memset(activated + bottleneck, 0, (problem.activated_stride - bottleneck) * sizeof(Input));
        if (problem.norm_weight.data == nullptr) {
            for_row(problem, token, [&](int64_t column, Floats x, int64_t columns) {
                store_first(out + column, x, columns);
            });
            continue;
        }
        // Where |mean| >> std, the sum of x is not exact enough. So the mean of the deviations from it corrects it. The
        // correction stays a separate number, because it may be too small to change an fp32 mean.
        Floats sum = {}, deviations = {}, squares = {};
        for_row(problem, token, [&](int64_t, Floats x, int64_t) { sum += x; });
        const float first_mean = sum_of_lanes(sum) / width;
        auto deviation = [&](Floats x, float from, int64_t columns) {
            return lane_numbers() < (int32_t)(columns < kWidth ? columns : kWidth) ? x - from : Floats{};
        };
        for_row(problem, token, [&](int64_t, Floats x, int64_t columns) {
            deviations += deviation(x, first_mean, columns);
        });
        const float correction = sum_of_lanes(deviations) / width;
        for_row(problem, token, [&](int64_t, Floats x, int64_t columns) {
            const Floats centred = deviation(x - first_mean, correction, columns);
            squares += centred * centred;
        });
        const float rstd = 1 / __builtin_sqrtf(sum_of_lanes(squares) / width + problem.eps);
        for_row(problem, token, [&](int64_t column, Floats x, int64_t columns) {
            Floats value = (x - first_mean - correction) * rstd * load_first(problem.norm_weight, column, columns);
            if (problem.norm_bias.data != nullptr) value += load_first(problem.norm_bias, column, columns);
            store_first(out + column, value, columns);
        });
        problem.mean[token] = first_mean + correction;
        problem.rstd[token] = rstd;
    }
}

template <class Compute>
Product<Compute> down_product(const Problem& problem) {
    return {static_cast<const typename Compute::Input*>(problem.normalized), problem.normalized_stride,
            static_cast<const typename Compute::Weight*>(problem.down_weight.data), problem.tokens,
            problem.bottleneck, problem.width};
}

template <class Compute>
Product<Compute> up_product(const Problem& problem) {
    return {static_cast<const typename Compute::Input*>(problem.activated), problem.activated_stride,
            static_cast<const typename Compute::Weight*>(problem.up_weight.data), problem.tokens, problem.width,
            problem.bottleneck};
}

template <class Compute>
void down(const Problem& problem, int64_t first_block, int64_t last_block, int64_t next_up_block) {
    const Product<Compute> product = down_product<Compute>(problem), next = up_product<Compute>(problem);
    typedef typename Compute::Weight Weight;
    Weight* preactivation = static_cast<Weight*>(problem.preactivation.data);
    auto* activated = static_cast<typename Compute::Input*>(problem.activated);
    auto finish = [&](int64_t token, int64_t column, Floats sums, int64_t columns) {
        if (problem.down_bias.data != nullptr) sums += load_first(problem.down_bias, column, columns);
        Weight* rounded = preactivation + token * problem.bottleneck + column;
        store_first(rounded, sums, columns);
        store_first(activated + token * problem.activated_stride + column,
                    activations::activate(problem.activation, load_first(rounded, columns)), columns);
    };
    for (int64_t block = first_block; block < last_block; block++) {
        const bool is_last = block + 1 == last_block;
        matmul_block(product, block, is_last ? next.block(next_up_block) : product.block(block + 1),
                       is_last ? next.block(next_up_block + 1) : product.block(block + 2), finish);
    }
}

template <class Compute>
void up(const Problem& problem, int64_t first_block, int64_t last_block) {
    const Product<Compute> product = up_product<Compute>(problem);
    const float scale = load_first(problem.scale, 0, 1)[0];
    auto finish = [&](int64_t token, int64_t column, Floats sums, int64_t columns) {
        if (problem.up_bias.data != nullptr) sums += load_first(problem.up_bias, column, columns);
        const int64_t index = token * problem.width + column;
        store_first(problem.out, index, load_first(problem.x, index, columns) + scale * sums, columns);
    };
    for (int64_t block = first_block; block < last_block; block++)
        matmul_block(product, block, product.block(block + 1),
                       block + 1 == last_block ? product.block(block + 1) : product.block(block + 2), finish);
}

void normalize_any(const Problem& problem, int64_t first_token, int64_t last_token) {
    if (problem.down_weight.is_bfloat16)
        normalize<Bf16Compute>(problem, first_token, last_token);
    else
        normalize<Fp32Compute>(problem, first_token, last_token);
}

void down_any(const Problem& problem, int64_t first_block, int64_t last_block, int64_t next_up_block) {
    if (problem.down_weight.is_bfloat16)
        down<Bf16Compute>(problem, first_block, last_block, next_up_block);
    else
        down<Fp32Compute>(problem, first_block, last_block, next_up_block);
}

void up_any(const Problem& problem, int64_t first_block, int64_t last_block) {
    if (problem.down_weight.is_bfloat16)
        up<Bf16Compute>(problem, first_block, last_block);
    else
        up<Fp32Compute>(problem, first_block, last_block);
}

}  // namespace

namespace lynx::adapter {

extern const Kernels LYNX_KERNELS = {normalize_any, down_any, up_any, renormalize_any, norm_backward_any};

}  // namespace lynx::adapter
