// How frames are resized and cut into patches: Pillow's weights, and the order of the pixels. Plain functions of numbers,
// the same on a CPU and on a GPU. (Lanczos's sines may differ there in their last bit, far below a weight's unit.)
//
// Weights must be Pillow's to the last bit, so no product may be fused with a sum. Compile this for a CPU with
// -ffp-contract=off. On a GPU `product` prevents it.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/portable.h"
#include "pack_frames/frame.h"

namespace lynx::frames {
// Unnamed, because files that are compiled for several instruction sets include this: common/vector.h says why.
namespace {

constexpr int kWeightBits = 22;  // weights are integers, in units of 2^-22

LYNX_PORTABLE double product(double a, double b) {
#if defined(__CUDA_ARCH__)
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
}

// Keys' cubic convolution kernel with a = -0.5.
LYNX_PORTABLE double bicubic(double x) {
    x = x < 0.0 ? -x : x;
    if (x < 1.0) return product(product(product(1.5, x) - 2.5, x), x) + 1.0;
    if (x < 2.0) return product(product(product(x - 5.0, x) + 8.0, x) - 4.0, -0.5);
    return 0.0;
}

LYNX_PORTABLE double sinc(double x) {
    if (x == 0.0) return 1.0;
    const double angle = product(x, 3.14159265358979323846);
#if defined(__CUDA_ARCH__)
    return sinpi(x) / angle;  // sin would prepare for huge angles, in local memory
#else
    return sin(angle) / angle;
#endif
}

LYNX_PORTABLE double filter_at(Resample resample, double x) {
    if (resample == Resample::kBicubic) return bicubic(x);
    if (resample == Resample::kLanczos) return -3.0 <= x && x < 3.0 ? product(sinc(x), sinc(x / 3)) : 0.0;
    x = x < 0.0 ? -x : x;
    return x < 1.0 ? 1.0 - x : 0.0;
}

// Behind this many inputs from the centre, a filter that is not stretched is 0.
LYNX_PORTABLE double support_of(Resample resample) {
    return resample == Resample::kBilinear ? 1.0 : resample == Resample::kBicubic ? 2.0 : 3.0;
}

// The inputs of one output: `count` of them, from `first` on.
struct Window {
    int64_t first, count;
    double centre;   // of the output, in inputs
    double inverse;  // of the filter's stretch: shrinking widens the filter, which is the antialiasing
    double total;    // the sum of the weights before they are normalised
    Resample resample;
};

LYNX_PORTABLE double raw_weight(const Window& window, int64_t i) {
    return filter_at(window.resample, product((double)(window.first + i) - window.centre + 0.5, window.inverse));
}

// Of the kept outputs, number `output`: 0 ... side.count - 1.
LYNX_PORTABLE Window window_of(const Side& side, int64_t output) {
    const double scale = (double)side.length / (double)side.resized;
    const double stretch = scale < 1.0 ? 1.0 : scale;
    const double support = support_of(side.resample) * stretch;
    Window window;
    window.resample = side.resample;
    window.centre = product((double)(side.start + output) + 0.5, scale);
    window.inverse = 1.0 / stretch;
    const int64_t first = (int64_t)(window.centre - support + 0.5);
    const int64_t end = (int64_t)(window.centre + support + 0.5);
    window.first = first < 0 ? 0 : first;
    window.count = (end < side.length ? end : side.length) - window.first;
    window.total = 0.0;
    for (int64_t i = 0; i < window.count; i++) window.total += raw_weight(window, i);
    return window;
}

// The largest number of inputs that a window has.
LYNX_PORTABLE int64_t max_inputs(const Side& side) {
    const double scale = (double)side.length / (double)side.resized;
    const int64_t most = (int64_t)(2.0 * support_of(side.resample) * (scale < 1.0 ? 1.0 : scale)) + 2;
    return most < side.length ? most : side.length;
}

// The weight of input window.first + i, rounded half away from zero.
LYNX_PORTABLE int32_t weight_of(const Window& window, int64_t i) {
    const double weight = product(raw_weight(window, i) / window.total, 1 << kWeightBits);
    return (int32_t)(weight < 0.0 ? weight - 0.5 : weight + 0.5);
}

// The byte of a sum of weights times bytes. Such sums stay below 2^31: the weights of a window sum to 2^22, and their
// absolute values to less than twice that.
LYNX_PORTABLE uint8_t byte_of(int32_t sum) {
    const int32_t level = (sum + (1 << (kWeightBits - 1))) >> kWeightBits;
    return level < 0 ? 0 : level > 255 ? 255 : (uint8_t)level;
}

// The place of a pixel of the result among its frame's outputs. Patches follow each other row by row, and a patch is
// (channel, row, column). If one patch is the whole result, the outputs are (channel, row, column).
LYNX_PORTABLE int64_t patch_offset(const Grid& grid, int64_t channel, int64_t row, int64_t column) {
    const int64_t height = grid.patch_height, width = grid.patch_width;
    const int64_t patch = row / height * (grid.width / width) + column / width;
    return ((patch * 3 + channel) * height + row % height) * width + column % width;
}

}  // namespace
}  // namespace lynx::frames
