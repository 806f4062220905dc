// What a call of pack_frames is, for the kernels and their callers. Plain data, pointers and sizes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "pack_frames/frame.h"

namespace lynx::frames {

struct Problem {
    const Frame* frames;
    const Resizing* resizings;  // of each frame
    int64_t num_frames;
    Grid grid;
    int64_t merge_size;     // patches come in blocks of so many rows and columns, which divide the result's
    int64_t copies;         // a patch has each of its channels so many times: (3, copies, patch height, patch width)
    Dtype dtype;
    const void* levels;     // (3, 256) of that dtype: what each byte of each channel becomes; null: itself, a byte
    float mean[3], std[3];  // what the levels were computed with: (byte / 255 - mean) / std, every step rounded to fp32
    void* out;              // of that dtype, or bytes
    // Of `out`, in elements. Patches follow each other without gaps, and copies of a channel, too.
    int64_t frame_stride, channel_stride, row_stride;
};

// The weights of one side, in the form that the instruction set needs. Inputs come in groups of four, counted from the
// edge of the crop. Inputs outside an output's window, or outside the crop, have the weight 0.
struct Filter {
    int64_t count;          // of outputs
    int64_t begin, end;     // groups that any output needs
    int64_t max_groups;     // of one output
    const int32_t* first;   // (count,): an output's first group
    const int32_t* last;    // (count,): behind its last one
    const uint32_t* words;  // (count, max_groups, Kernels::weight_words)
};

// What one thread does at a time: some rows of one frame's result. Both filters are null if pixels are only copied.
struct Task {
    const Frame* frame;
    const Filter* row_filter;     // of the crop's rows
    const Filter* column_filter;  // of its columns, mirrored for a flipped frame
    bool is_vertical_first;
    int64_t top, left;            // of what is copied, in the crop
    int64_t first_row, last_row;  // of the result; a strip starts and ends there
    int64_t out_offset;           // of the frame, in elements
};

// The kernels of one instruction set.
struct Kernels {
    int64_t weight_words;  // of four weights
    void (*pack_weights)(const int32_t* four, uint32_t* words);
    // Whether vector code computes all levels exactly. Else they are looked up.
    bool (*computes_levels)(const Problem&);
    size_t (*scratch_bytes)(const Problem&, const Task&);
    void (*run)(const Problem&, const Task&, bool computes_levels, void* scratch);  // scratch is 64-byte aligned
};

// Rows are finished in strips, so that everything between the passes and the output stays in the L1 or L2 cache. No
// strip crosses from one row of patches to the next.
constexpr int64_t kStripRows = 32;

namespace {  // unnamed: filter.h says why

inline int64_t strip_end(int64_t row, int64_t patch_height) {
    const int64_t next_patches = (row / patch_height + 1) * patch_height;
    return next_patches < row + kStripRows ? next_patches : row + kStripRows;
}

// The place of a pixel that is the first of its row in a patch, in its frame's result.
inline int64_t place_of(const Problem& problem, int64_t channel, int64_t row, int64_t column) {
    const Grid& grid = problem.grid;
    const int64_t merge = problem.merge_size, blocks = grid.width / (grid.patch_width * merge);
    const int64_t i = row / grid.patch_height, j = column / grid.patch_width;
    const int64_t patch = ((i / merge * blocks + j / merge) * merge + i % merge) * merge + j % merge;
    return (patch * 3 + channel) * problem.channel_stride + row % grid.patch_height * problem.row_stride;
}

}  // namespace

}  // namespace lynx::frames
