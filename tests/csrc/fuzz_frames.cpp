// pack_frames with random sizes, strides, crops and options, against the simplest implementation.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "pack_frames/filter.h"
#include "pack_frames/cpu/frames.h"
#include "common/instruction_sets.h"
#include "fuzz.h"

namespace {

using lynx::Dtype;
using namespace lynx::frames;

// A frame in memory that holds nothing else, so that AddressSanitizer sees every access beside it.
struct Image {
    std::vector<uint8_t> bytes;
    Frame frame;
};

Image random_image(Random& random) {
    const int64_t most = random.flag() ? 12 : random.flag() ? 60 : 300;
    const int64_t height = random.number(1, most), width = random.number(1, 3000 / height < 9 ? 9 : 3000 / height);
    Image image;
    Frame& frame = image.frame;
    // Interleaved, with or without bytes between pixels and rows; or planes; or one pixel, row or channel repeated.
    const bool is_planar = random.number(0, 3) == 0;
    frame.channel_stride = is_planar ? height * width : 1;
    frame.column_stride = is_planar ? 1 : random.number(3, 5);
    frame.row_stride = is_planar ? width : frame.column_stride * width + (random.flag() ? 0 : random.number(1, 9));
    if (random.number(0, 9) == 0) frame.channel_stride = 0;
    if (random.number(0, 9) == 0) frame.column_stride = 0;
    if (random.number(0, 9) == 0) frame.row_stride = 0;
    const int64_t span = 2 * frame.channel_stride + (width - 1) * frame.column_stride + (height - 1) * frame.row_stride;
    image.bytes.resize(span + 1);
    const bool is_harsh = random.flag();  // black and white, where the filter overshoots
    for (uint8_t& byte : image.bytes) byte = is_harsh ? 255 * random.number(0, 1) : random.number(0, 255);
    int64_t first = 0;
    for (auto [stride, length] : {std::pair(&frame.row_stride, height), std::pair(&frame.column_stride, width)})
        if (random.number(0, 3) == 0) {  // from the other end
            first += (length - 1) * *stride;
            *stride = -*stride;
        }
    const int64_t top = random.flag() ? 0 : random.number(0, height - 1);
    const int64_t left = random.flag() ? 0 : random.number(0, width - 1);
    frame.data = image.bytes.data() + first + top * frame.row_stride + left * frame.column_stride;
    frame.height = random.flag() ? height - top : random.number(1, height - top);
    frame.width = random.flag() ? width - left : random.number(1, width - left);
    frame.is_flipped = random.flag();
    return image;
}

uint8_t filtered(const Side& side, int64_t output, const uint8_t* inputs, int64_t stride) {
    const Window window = window_of(side, output);
    int64_t sum = 0, magnitudes = 0;
    for (int64_t i = 0; i < window.count; i++) {
        sum += int64_t{weight_of(window, i)} * inputs[(window.first + i) * stride];
        magnitudes += std::abs(weight_of(window, i));
    }
    if (window.count > max_inputs(side)) fail("pack_frames", "a window has too many inputs");
    if (magnitudes >= 2 << kWeightBits) fail("pack_frames", "the weights of a window are too large");
    return byte_of(static_cast<int32_t>(sum));
}

using Plane = std::vector<uint8_t>;  // row by row

Plane resized_columns(const Plane& plane, const Side& side) {
    Plane out(static_cast<int64_t>(plane.size()) / side.length * side.count);
    for (int64_t i = 0; i < static_cast<int64_t>(out.size()); i++)
        out[i] = filtered(side, i % side.count, plane.data() + i / side.count * side.length, 1);
    return out;
}

Plane resized_rows(const Plane& plane, const Side& side) {
    const int64_t width = static_cast<int64_t>(plane.size()) / side.length;
    Plane out(side.count * width);
    for (int64_t i = 0; i < static_cast<int64_t>(out.size()); i++)
        out[i] = filtered(side, i / width, plane.data() + i % width, width);
    return out;
}

// Planes, (3, height, width).
std::vector<uint8_t> resized(const Grid& grid, const Frame& frame, const Resizing& resizing) {
    std::vector<uint8_t> out(3 * grid.height * grid.width);
    for (int64_t channel = 0; channel < 3; channel++) {
        Plane plane;
        for (int64_t y = 0; y < frame.height; y++)
            for (int64_t x = 0; x < frame.width; x++)
                plane.push_back(
                    frame.data[y * frame.row_stride + x * frame.column_stride + channel * frame.channel_stride]);
        if (resizing.is_vertical_first)
            plane = resized_columns(resized_rows(plane, resizing.rows), resizing.columns);
        else
            plane = resized_rows(resized_columns(plane, resizing.columns), resizing.rows);
        for (int64_t y = 0; y < grid.height; y++)
            for (int64_t x = 0; x < grid.width; x++) {
                const int64_t column = frame.is_flipped ? grid.width - 1 - x : x;
                out[(channel * grid.height + y) * grid.width + x] = plane[y * grid.width + column];
            }
    }
    return out;
}

// Some of the pixels of a side that is resized to any length, its own among them.
Side random_side(Random& random, int64_t length, int64_t count, Resample resample) {
    const int64_t resized = length >= count && random.flag() ? length : count + (random.flag() ? random.number(0, 40) : 0);
    return {length, resized, random.number(0, resized - count), count, resample};
}

uint16_t as_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// (3, 256) elements of `bytes` bytes.
std::vector<uint8_t> make_levels(const Problem& problem, int64_t bytes) {
    std::vector<uint8_t> levels(768 * bytes);
    for (int channel = 0; channel < 3; channel++)
        for (int byte = 0; byte < 256; byte++) {
            const double exact = (byte / 255.0 - problem.mean[channel]) / problem.std[channel];
            const float rounded =
                (static_cast<float>(byte / 255.0) - problem.mean[channel]) / problem.std[channel];
            const uint16_t half = problem.dtype == Dtype::kBFloat16 ? as_bfloat16(rounded) : 256 * channel + byte;
            uint8_t* to = &levels[(256 * channel + byte) * bytes];
            if (bytes == 8) memcpy(to, &exact, bytes);
            if (bytes == 4) memcpy(to, &rounded, bytes);
            if (bytes == 2) memcpy(to, &half, bytes);
        }
    return levels;
}

}  // namespace

void fuzz_frames(uint64_t seed) {
    Random random(seed);
    std::vector<Image> images;
    std::vector<Frame> frames;
    for (int64_t i = random.number(0, 3); i > 0; i--) images.push_back(random_image(random));
    for (const Image& image : images) frames.push_back(image.frame);
    Problem problem = {};
    problem.frames = frames.data();
    problem.num_frames = frames.size();
    Grid& grid = problem.grid;
    for (auto [side, patch_side] : {std::pair(&grid.height, &grid.patch_height), {&grid.width, &grid.patch_width}}) {
        *patch_side = random.flag() ? random.number(1, 20) : random.number(1, 70);
        *side = *patch_side * random.number(1, *patch_side > 20 ? 2 : 4);
    }
    const Resample resample = static_cast<Resample>(random.number(0, 2));
    std::vector<Resizing> resizings;
    for (const Frame& frame : frames)
        resizings.push_back({random_side(random, frame.height, grid.height, resample),
                             random_side(random, frame.width, grid.width, resample), random.flag()});
    problem.resizings = resizings.data();
    problem.copies = random.flag() ? 1 : random.number(2, 3);
    problem.merge_size = 1;
    for (int64_t size : {2, 3})
        if (grid.height / grid.patch_height % size == 0 && grid.width / grid.patch_width % size == 0)
            problem.merge_size = size;
    problem.dtype = static_cast<Dtype>(random.number(0, 3));
    const bool has_levels = random.number(0, 4) > 0;
    int64_t bytes = problem.dtype == Dtype::kDouble ? 8 : problem.dtype == Dtype::kFloat ? 4 : 2;
    if (!has_levels) bytes = 1;
    for (int channel = 0; channel < 3; channel++) {
        problem.mean[channel] = random.number(0, 1000) / 1000.0f;
        problem.std[channel] = random.number(1, 1000) / 1000.0f * (random.number(0, 9) == 0 ? 1e38f : 1.0f);
    }
    const std::vector<uint8_t> levels = make_levels(problem, bytes);
    problem.levels = has_levels ? levels.data() : nullptr;

    const int64_t pixels = grid.height * grid.width, copy_size = grid.patch_height * grid.patch_width;
    problem.row_stride = grid.patch_width;
    problem.channel_stride = problem.copies * copy_size;
    problem.frame_stride = 3 * problem.copies * pixels;
    if (copy_size == pixels && problem.copies == 1 && random.flag()) {  // a part of a larger canvas
        problem.row_stride += random.number(0, 9);
        problem.channel_stride = grid.height * problem.row_stride + random.number(0, 9);
        problem.frame_stride = 3 * problem.channel_stride + random.number(0, 9);
    }
    std::vector<uint8_t> expected(problem.num_frames * problem.frame_stride * bytes, 0xa5);
    for (int64_t i = 0; i < problem.num_frames; i++) {
        const std::vector<uint8_t> planes = resized(grid, frames[i], resizings[i]);
        for (int64_t j = 0; j < 3 * pixels * problem.copies; j++) {
            const int64_t copy = j / (3 * pixels), pixel = j % (3 * pixels), channel = pixel / pixels;
            const int64_t row = pixel % pixels / grid.width, column = pixel % grid.width;
            const int64_t place = i * problem.frame_stride + place_of(problem, channel, row, column) +
                                  copy * copy_size + column % grid.patch_width;
            const uint8_t byte = planes[pixel];
            memcpy(&expected[place * bytes], has_levels ? &levels[(256 * channel + byte) * bytes] : &byte, bytes);
        }
    }
    for (const std::string& name : lynx::instruction_sets()) {
        lynx::force_instruction_set(name);
        std::vector<uint8_t> out(expected.size(), 0xa5);
        problem.out = out.data();
        pack_frames(problem, random.number(1, 3));
        if (out != expected) fail(name, "wrong result");
    }
    lynx::force_instruction_set("");
}
