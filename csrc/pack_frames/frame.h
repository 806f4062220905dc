// A frame, for the CPU and CUDA code of pack_frames.
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

}  // namespace lynx::frames
