// What a call of pack_frames is, in the terms that the kernels and their callers share. Plain data, pointers and sizes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace lynx::frames {

// The part of an RGB picture that a box cuts out; strides in bytes, of any sign.
struct Frame {
    const uint8_t* data;
    int64_t row_stride, column_stride, channel_stride;
    int64_t height, width;
    bool is_flipped;  // the result is mirrored left to right
};

struct Problem {
    const Frame* frames;
    int64_t num_frames;
    int64_t size, patch_size;  // patch_size divides size; equal to it for whole pictures
    bool is_exact, rounds_down;  // as square_side takes them
    Dtype dtype;
    const void* levels;      // (3, 256) of that dtype: what each byte of each channel becomes
    float mean[3], std[3];   // what the levels were computed with: (byte / 255 - mean) / std, each step rounded to fp32
    void* out;               // (num_frames, 3 * size * size) of that dtype
};

// One side's weights as one instruction set wants them. Inputs are taken in groups of four, counted from the crop's
// edge; those that lie outside an output's window, or outside the crop, weigh 0.
struct Filter {
    int64_t count;             // of outputs
    int64_t begin, end;        // groups that any output needs
    int64_t most_groups;       // of one output
    const int32_t* first;      // (count,): an output's first group
    const int32_t* last;       // (count,): behind its last
    const uint32_t* words;     // (count, most_groups, Kernels::weight_words)
};

// What one thread does at a time: some rows of one frame's square. Both filters are null where pixels are only copied.
struct Unit {
    const Frame* frame;
    const Filter* row_filter;     // from the crop's rows
    const Filter* column_filter;  // from its columns, mirrored for a flipped frame
    int64_t top, left;            // of what is copied, in the crop
    int64_t first_row, last_row;  // of the square, where a strip starts and ends
    int64_t out_offset;           // of the frame, in elements
};

// One instruction set's kernels.
struct Kernels {
    int64_t weight_words;  // of four weights
    void (*pack_weights)(const int32_t* four, uint32_t* words);
    // Whether vectors compute all levels exactly; else they are looked up.
    bool (*computes_levels)(const Problem&);
    size_t (*scratch_bytes)(const Problem&, const Unit&);
    void (*run)(const Problem&, const Unit&, bool computes_levels, void* scratch);  // scratch 64-byte aligned
};

// Rows are finished in strips: what is between the passes and the output then stays in the L1 or L2 cache. No strip
// crosses from one row of patches to the next.
constexpr int64_t kStripRows = 32;

namespace {  // as in filter.h

inline int64_t strip_end(int64_t row, int64_t patch_size) {
    const int64_t next_patches = (row / patch_size + 1) * patch_size;
    return next_patches < row + kStripRows ? next_patches : row + kStripRows;
}

}  // namespace

}  // namespace lynx::frames
