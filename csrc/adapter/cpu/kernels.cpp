// The adapter's kernels of one instruction set. Compiled once for each, with LYNX_KERNELS the name of the result.
#include "activations.h"
#include "layer_norm.h"
#include "load.h"
#include "multiply.h"

namespace {

#if defined(__AVX512BF16__)
typedef Pairs BFloat16Compute;
#else
typedef Single<BFloat16> BFloat16Compute;
#endif
typedef Single<float> FloatCompute;

// `function(column, x, columns)` for the vectors of a token's row; x is 0 behind the last column.
template <class Function>
LYNX_INLINE void for_row(const lynx::Adapter& adapter, int64_t token, Function function) {
    for (int64_t column = 0; column < adapter.width; column += kWidth)
        function(column, load_first(adapter.x, token * adapter.width + column, adapter.width - column),
                 adapter.width - column);
}

// LayerNorm's output, or x itself, as operand of the down-projection.
template <class Compute>
void normalize(const lynx::Adapter& adapter, int64_t first_token, int64_t last_token) {
    typedef typename Compute::Left Left;
    const int64_t width = adapter.width, bottleneck = adapter.bottleneck;
    for (int64_t token = first_token; token < last_token; token++) {
        Left* out = static_cast<Left*>(adapter.normalized) + token * adapter.normalized_stride;
        Left* activated = static_cast<Left*>(adapter.activated) + token * adapter.activated_stride;
        memset(out + width, 0, (adapter.normalized_stride - width) * sizeof(Left));
        memset(activated + bottleneck, 0, (adapter.activated_stride - bottleneck) * sizeof(Left));
        if (adapter.norm_weight.data == nullptr) {
            for_row(adapter, token, [&](int64_t column, Floats x, int64_t columns) {
                store_first(out + column, x, columns);
            });
            continue;
        }
        // Where |mean| >> std a sum of x loses what tells the rows apart, so the mean is corrected by the mean of the
        // deviations from it; the correction, too small to change an fp32 mean, stays a number of its own.
        Floats sum = {}, deviations = {}, squares = {};
        for_row(adapter, token, [&](int64_t, Floats x, int64_t) { sum += x; });
        const float about_mean = sum_of_lanes(sum) / width;
        auto deviation = [&](Floats x, float from, int64_t columns) {
            return lane_numbers() < (int32_t)(columns < kWidth ? columns : kWidth) ? x - from : Floats{};
        };
        for_row(adapter, token, [&](int64_t, Floats x, int64_t columns) {
            deviations += deviation(x, about_mean, columns);
        });
        const float correction = sum_of_lanes(deviations) / width;
        for_row(adapter, token, [&](int64_t, Floats x, int64_t columns) {
            const Floats centred = deviation(x - about_mean, correction, columns);
            squares += centred * centred;
        });
        const float rstd = 1 / __builtin_sqrtf(sum_of_lanes(squares) / width + adapter.eps);
        for_row(adapter, token, [&](int64_t column, Floats x, int64_t columns) {
            Floats value = (x - about_mean - correction) * rstd * load_first(adapter.norm_weight, column, columns);
            if (adapter.norm_bias.data != nullptr) value += load_first(adapter.norm_bias, column, columns);
            store_first(out + column, value, columns);
        });
        adapter.mean[token] = about_mean + correction;
        adapter.rstd[token] = rstd;
    }
}

template <class Compute>
Product<Compute> down_product(const lynx::Adapter& adapter) {
    return {static_cast<const typename Compute::Left*>(adapter.normalized), adapter.normalized_stride,
            static_cast<const typename Compute::Weight*>(adapter.down_weight.data), adapter.tokens,
            adapter.bottleneck, adapter.width};
}

template <class Compute>
Product<Compute> up_product(const lynx::Adapter& adapter) {
    return {static_cast<const typename Compute::Left*>(adapter.activated), adapter.activated_stride,
            static_cast<const typename Compute::Weight*>(adapter.up_weight.data), adapter.tokens, adapter.width,
            adapter.bottleneck};
}

template <class Compute>
void down(const lynx::Adapter& adapter, int64_t first_block, int64_t last_block, int64_t next_up_block) {
    const Product<Compute> product = down_product<Compute>(adapter), next = up_product<Compute>(adapter);
    typedef typename Compute::Weight Weight;
    Weight* preactivation = static_cast<Weight*>(adapter.preactivation.data);
    auto* activated = static_cast<typename Compute::Left*>(adapter.activated);
    auto finish = [&](int64_t token, int64_t column, Floats sums, int64_t columns) {
        if (adapter.down_bias.data != nullptr) sums += load_first(adapter.down_bias, column, columns);
        Weight* rounded = preactivation + token * adapter.bottleneck + column;
        store_first(rounded, sums, columns);
        store_first(activated + token * adapter.activated_stride + column,
                    activate(adapter.activation, load_first(rounded, columns)), columns);
    };
    for (int64_t block = first_block; block < last_block; block++) {
        const bool is_last = block + 1 == last_block;
        multiply_block(product, block, is_last ? next.block(next_up_block) : product.block(block + 1),
                       is_last ? next.block(next_up_block + 1) : product.block(block + 2), finish);
    }
}

template <class Compute>
void up(const lynx::Adapter& adapter, int64_t first_block, int64_t last_block) {
    const Product<Compute> product = up_product<Compute>(adapter);
    const float scale = load_first(adapter.scale, 0, 1)[0];
    auto finish = [&](int64_t token, int64_t column, Floats sums, int64_t columns) {
        if (adapter.up_bias.data != nullptr) sums += load_first(adapter.up_bias, column, columns);
        const int64_t index = token * adapter.width + column;
        store_first(adapter.out, index, load_first(adapter.x, index, columns) + scale * sums, columns);
    };
    for (int64_t block = first_block; block < last_block; block++)
        multiply_block(product, block, product.block(block + 1),
                       block + 1 == last_block ? product.block(block + 1) : product.block(block + 2), finish);
}

void any_normalize(const lynx::Adapter& adapter, int64_t first_token, int64_t last_token) {
    if (adapter.down_weight.is_bfloat16)
        normalize<BFloat16Compute>(adapter, first_token, last_token);
    else
        normalize<FloatCompute>(adapter, first_token, last_token);
}

void any_down(const lynx::Adapter& adapter, int64_t first_block, int64_t last_block, int64_t next_up_block) {
    if (adapter.down_weight.is_bfloat16)
        down<BFloat16Compute>(adapter, first_block, last_block, next_up_block);
    else
        down<FloatCompute>(adapter, first_block, last_block, next_up_block);
}

void any_up(const lynx::Adapter& adapter, int64_t first_block, int64_t last_block) {
    if (adapter.down_weight.is_bfloat16)
        up<BFloat16Compute>(adapter, first_block, last_block);
    else
        up<FloatCompute>(adapter, first_block, last_block);
}

}  // namespace

namespace lynx {

extern const AdapterKernels LYNX_KERNELS = {any_normalize, any_down, any_up, any_renormalize, any_norm_backward};

}  // namespace lynx
