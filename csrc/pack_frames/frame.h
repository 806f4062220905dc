// A frame and what becomes of it, for the CPU and CUDA code of pack_frames.
#pragma once

#include <cstdint>

namespace lynx::frames {

// The part of an RGB image that a box cuts out. Strides are in bytes, and may be negative.
struct Frame {
    const uint8_t* data;
    int64_t row_stride, column_stride, channel_stride;
    int64_t height, width;
    bool is_flipped;  // the result is mirrored left to right
};

enum class Resample : int32_t { kBilinear, kBicubic, kLanczos };

// How one side of a frame becomes one side of the result: its `length` pixels are resized to `resized`, and `count` of
// them are kept, from `start` on.
struct Side {
    int64_t length, resized, start, count;
    Resample resample;
};

struct Resizing {
    Side rows, columns;
    bool is_vertical_first;  // the rows are resized, and rounded to bytes, before the columns
};

// The size of the result, and of the patches that it is cut into. Patches divide it.
struct Grid {
    int64_t height, width, patch_height, patch_width;
};

// `fit` is the height that a frame is resized to and the first row kept, the same of its columns, and whether the
// vertical pass comes first.
inline Resizing resizing_of(const Frame& frame, const int64_t* fit, const Grid& grid, Resample resample) {
    return {{frame.height, fit[0], fit[1], grid.height, resample},
            {frame.width, fit[2], fit[3], grid.width, resample},
            fit[4] != 0};
}

}  // namespace lynx::frames
