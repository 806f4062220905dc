// The passes of backward over the LayerNorm, in fp32. Each row is read from memory once, then from a cache.
#pragma once

#include "load.h"

namespace {

using lynx::adapter::kSummedTokens;
using lynx::adapter::LayerNorm;

// Calls function(column, columns) for every vector of a row. Its first `columns` numbers exist.
template <class Function>
LYNX_INLINE void for_vectors(int64_t width, Function function) {
    int64_t column = 0;
    for (; column + kWidth <= width; column += kWidth) function(column, int64_t(kWidth));
    if (column < width) function(column, width - column);
}

// Stream is the dtype of x and out, Compute that of the products.
template <class Stream, class Compute>
void renormalize(const LayerNorm& norm, int64_t first_token, int64_t last_token) {
    const int64_t width = norm.width;
    const float *weight = norm.weight, *bias = norm.bias;
    for (int64_t token = first_token; token < last_token; token++) {
        const Stream* x = static_cast<const Stream*>(norm.x.data) + token * width;
        Compute* out = static_cast<Compute*>(norm.normalized.data) + token * width;
        const float mean = norm.mean[token], rstd = norm.rstd[token];
        for_vectors(width, [=](int64_t column, int64_t columns) {
            Floats value = (load_first(x + column, columns) - mean) * rstd * load_first(weight + column, columns);
            if (bias != nullptr) value += load_first(bias + column, columns);
            store_first(out + column, value, columns);
        });
    }
}

// With s the standardised x and g = dn w:  dx = grad + rstd (g - mean(g) - s mean(g s)),  dw = sum dn s,  db = sum dn.
template <class Stream, class Compute>
void norm_backward(const LayerNorm& norm, int64_t block) {
    const int64_t width = norm.width, first_token = block * kSummedTokens;
    const int64_t last_token = min(norm.tokens, first_token + kSummedTokens);
    const float* weight = norm.weight;
    float* weight_sums = norm.sums == nullptr ? nullptr : norm.sums + block * 2 * width;
    float* bias_sums = weight_sums + width;
    for (int64_t token = first_token; token < last_token; token++) {
        const Stream* x = static_cast<const Stream*>(norm.x.data) + token * width;
        const Compute* normalized_grad = static_cast<const Compute*>(norm.normalized_grad.data) + token * width;
        const float mean = norm.mean[token], rstd = norm.rstd[token];
        if (norm.x_grad.data != nullptr) {
            const Stream* grad = static_cast<const Stream*>(norm.grad.data) + token * width;
            Stream* x_grad = static_cast<Stream*>(norm.x_grad.data) + token * width;
            Floats sum = {}, product_sum = {};
            for_vectors(width, [&](int64_t column, int64_t columns) {  // behind the last column g is 0
                const Floats g = load_first(normalized_grad + column, columns) * load_first(weight + column, columns);
                sum += g;
                product_sum += g * (load_first(x + column, columns) - mean);
            });
            const float mean_g = sum_of_lanes(sum) / width, mean_gs = sum_of_lanes(product_sum) * rstd / width;
            for_vectors(width, [=](int64_t column, int64_t columns) {
                const Floats g = load_first(normalized_grad + column, columns) * load_first(weight + column, columns);
                const Floats s = (load_first(x + column, columns) - mean) * rstd;
                store_first(x_grad + column, load_first(grad + column, columns) + rstd * (g - mean_g - s * mean_gs),
                            columns);
            });
        }
        if (weight_sums != nullptr)
            for_vectors(width, [=](int64_t column, int64_t columns) {
                const Floats dn = load_first(normalized_grad + column, columns);
                const Floats s = (load_first(x + column, columns) - mean) * rstd;
                store_first(weight_sums + column, load_first(weight_sums + column, columns) + dn * s, columns);
                store_first(bias_sums + column, load_first(bias_sums + column, columns) + dn, columns);
            });
    }
}

template <class Stream>
void renormalize_from(const LayerNorm& norm, int64_t first_token, int64_t last_token) {
    if (norm.normalized.is_bfloat16)
        renormalize<Stream, BFloat16>(norm, first_token, last_token);
    else
        renormalize<Stream, float>(norm, first_token, last_token);
}

void renormalize_any(const LayerNorm& norm, int64_t first_token, int64_t last_token) {
    if (norm.x.is_bfloat16)
        renormalize_from<BFloat16>(norm, first_token, last_token);
    else
        renormalize_from<float>(norm, first_token, last_token);
}

template <class Stream>
void norm_backward_to(const LayerNorm& norm, int64_t block) {
    if (norm.normalized_grad.is_bfloat16)
        norm_backward<Stream, BFloat16>(norm, block);
    else
        norm_backward<Stream, float>(norm, block);
}

void norm_backward_any(const LayerNorm& norm, int64_t block) {
    if (norm.x.is_bfloat16)
        norm_backward_to<BFloat16>(norm, block);
    else
        norm_backward_to<float>(norm, block);
}

}  // namespace
