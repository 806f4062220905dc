// pack_frames as CUDA kernels: one for frames that keep their size; for the others one that computes filters and one
// that resizes.
//
// Outputs are looked up in a table of levels. So a kernel only moves elements of 2, 4 or 8 bytes, whatever their dtype
// is.
#pragma once

#include <cstdint>

#include "common/loads.h"
#include "common/phases.h"
#include "pack_frames/filter.h"
#include "pack_frames/frame.h"

namespace lynx::frames {

// Frames and filters are arguments of the launch, which may have 4 KB. More of them take more launches.
constexpr int kFramesOfALaunch = 32, kFiltersOfALaunch = 48;

// The filter of a Side, and where it stands in memory, from `offset` on: the first input and the number of inputs of
// each output, (2, outputs), then the weights, (max inputs, outputs).
struct FilterPlace {
    Side side;
    int64_t offset;
};

LYNX_GLOBAL(pack_frames_fwd_filters_kernel)
struct FillFilters : OnePhase {
    LYNX_RUN_BY(pack_frames_fwd_filters_kernel, FillFilters)
    static constexpr int kThreads = 128;

    struct Args {
        FilterPlace places[kFiltersOfALaunch];
        int32_t* filters;
        int blocks_of_a_filter;
    };

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared&, Registers&) {
        const FilterPlace& filter = args.places[place.block / args.blocks_of_a_filter];
        const int output = place.block % args.blocks_of_a_filter * kThreads + place.thread;
        const int64_t outputs = filter.side.count;
        if (output >= outputs) return;
        const Window window = window_of(filter.side, output);
        int32_t* to = args.filters + filter.offset + output;
        to[0] = static_cast<int32_t>(window.first);
        to[outputs] = static_cast<int32_t>(window.count);
        for (int64_t i = 0; i < window.count; i++) to[(2 + i) * outputs] = weight_of(window, i);
    }
};

// The pixel of the result that an output is.
struct Pixel {
    int channel, row, column;
};

// The inverse of patch_offset.
LYNX_PORTABLE Pixel pixel_at(int offset, const Grid& grid) {
    const int height = static_cast<int>(grid.patch_height), width = static_cast<int>(grid.patch_width);
    const int in_row = offset / width, in_channel = in_row / height, patch = in_channel / 3;
    const int patches = static_cast<int>(grid.width) / width;
    return {in_channel % 3, patch / patches * height + in_row % height, patch % patches * width + offset % width};
}

// Frames that keep their size, so that pixels are only copied. `frames` start at the first pixel of the result;
// mirrored ones run backwards. A thread writes kItems neighbouring elements: 16 bytes, or one element if outputs are
// not aligned.
LYNX_GLOBAL(pack_frames_fwd_copy_kernel)
template <class Element, int kItems>
struct CopyFrames : OnePhase {
    LYNX_RUN_BY(pack_frames_fwd_copy_kernel, CopyFrames)
    static constexpr int kThreads = 256, kOutputs = kThreads * kItems;  // of a block

    struct Args {
        Frame frames[kFramesOfALaunch];
        const Element* levels;  // (3, 256)
        Element* out;           // (frames, 3 * height * width)
        Grid grid;
        int blocks_of_a_frame;
    };

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared&, Registers&) {
        const int frame_number = place.block / args.blocks_of_a_frame;
        const int outputs = static_cast<int>(3 * args.grid.height * args.grid.width);
        const int patch_width = static_cast<int>(args.grid.patch_width);
        const int first = place.block % args.blocks_of_a_frame * kOutputs + place.thread * kItems;
        if (first >= outputs) return;
        const Frame& frame = args.frames[frame_number];
        Pixel pixel = pixel_at(first, args.grid);
        int columns_left = patch_width - first % patch_width;
        AlignedVector<Element, kItems> vector;
        LYNX_UNROLL
        for (int i = 0; i < kItems; i++) {
            const uint8_t byte = frame.data[pixel.row * frame.row_stride + pixel.column * frame.column_stride +
                                            pixel.channel * frame.channel_stride];
            vector.items[i] = args.levels[256 * pixel.channel + byte];
            pixel.column++;
            if (--columns_left == 0) {
                columns_left = patch_width;
                pixel = pixel_at(first + i + 1, args.grid);
            }
        }
        store(args.out + static_cast<int64_t>(frame_number) * outputs + first, vector);
    }
};

// Frames that are resized. A block has a tile of the result and goes through the input rows that it needs, kInputs of
// them a round. First these rows are resized to the width of the result, and rounded to bytes. Then each output adds
// its share of them. The order of the sums changes nothing, because they are sums of integers.
//
// Where the vertical pass comes first, `is_transposed`: rows and columns of the frames and of the result change places.
LYNX_GLOBAL(pack_frames_fwd_resize_kernel)
template <class Element>
struct ResizeFrames {
    LYNX_RUN_BY(pack_frames_fwd_resize_kernel, ResizeFrames)
    static constexpr int kThreads = 256, kPhases = 2;
    static constexpr int kRows = 16, kColumns = 32, kInputs = 16;  // a warp has 32 columns of a row and a channel
    static constexpr int kSums = kRows * 3 * kColumns / kThreads;
    static_assert(kInputs == kRows, "both phases distribute their pixels in the same way");

    struct Job {
        Frame frame;
        int64_t row_filter, column_filter;  // offsets of a FilterPlace
    };
    struct Args {
        Job jobs[kFramesOfALaunch];
        const int32_t* filters;
        const Element* levels;
        Element* out;
        Grid grid;
        bool is_transposed;
        int rows, columns;  // of the result, transposed where the frames are
        int tiles_of_a_row, tiles_of_a_frame;
    };
    struct Shared {
        uint8_t between[kInputs][3][kColumns];
    };
    struct Registers {
        int32_t sums[kSums];
    };

    LYNX_PORTABLE static int rounds(const Args& args, int block) {
        return (last_input(args, block) - first_input(args, block) + kInputs - 1) / kInputs;
    }

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared& shared, Registers& registers) {
        const Job& job = args.jobs[place.block / args.tiles_of_a_frame];
        const int32_t* row_filter = args.filters + job.row_filter;
        const int first = first_input(args, place.block) + place.round * kInputs;  // of this round
        const int end = last_input(args, place.block);
        LYNX_UNROLL
        for (int i = 0; i < kSums; i++) {
            const int number = i * kThreads + place.thread, in_tile = number % kColumns;
            const int column = place.block % args.tiles_of_a_row * kColumns + in_tile;
            const int channel = number / kColumns % 3, row = number / kColumns / 3;
            if (column >= args.columns) continue;
            if constexpr (kPhase == 0) {
                if (first + row < end)
                    shared.between[row][channel][in_tile] = resized_byte(args, job, first + row, column, channel);
            } else {
                const int output = first_row(args, place.block) + row;
                if (output >= args.rows) continue;
                const int shift = first - row_filter[output], count = row_filter[args.rows + output];
                for (int input = 0; input < kInputs; input++)
                    if (0 <= shift + input && shift + input < count)
                        registers.sums[i] += row_filter[(2 + shift + input) * args.rows + output] *
                                             shared.between[input][channel][in_tile];
                if (first + kInputs >= end) write(args, place.block, output, column, channel, registers.sums[i]);
            }
        }
    }

   private:
    LYNX_PORTABLE static int first_row(const Args& args, int block) {
        return block % args.tiles_of_a_frame / args.tiles_of_a_row * kRows;
    }

    LYNX_PORTABLE static int first_input(const Args& args, int block) {
        return args.filters[args.jobs[block / args.tiles_of_a_frame].row_filter + first_row(args, block)];
    }

    // Behind the last input of the tile's last row. The windows of later rows do not end earlier.
    LYNX_PORTABLE static int last_input(const Args& args, int block) {
        const int behind = first_row(args, block) + kRows, last = (behind < args.rows ? behind : args.rows) - 1;
        const int32_t* filter = args.filters + args.jobs[block / args.tiles_of_a_frame].row_filter;
        return filter[last] + filter[args.rows + last];
    }

    LYNX_PORTABLE static uint8_t resized_byte(const Args& args, const Job& job, int row, int column, int channel) {
        const int32_t* filter = args.filters + job.column_filter + column;
        const Frame& frame = job.frame;
        const uint8_t* from = frame.data + row * frame.row_stride + filter[0] * frame.column_stride +
                              channel * frame.channel_stride;
        const int count = filter[args.columns];
        int32_t sum = 0;
        for (int i = 0; i < count; i++) sum += filter[(2 + i) * args.columns] * from[i * frame.column_stride];
        return byte_of(sum);
    }

    LYNX_PORTABLE static void write(const Args& args, int block, int row, int column, int channel, int32_t sum) {
        const int frame_number = block / args.tiles_of_a_frame;
        const Grid& grid = args.grid;
        const int64_t to_row = args.is_transposed ? column : row, to_column = args.is_transposed ? row : column;
        const int64_t to = args.jobs[frame_number].frame.is_flipped ? grid.width - 1 - to_column : to_column;
        Element* out = args.out + static_cast<int64_t>(frame_number) * 3 * grid.height * grid.width;
        out[patch_offset(grid, channel, to_row, to)] = args.levels[256 * channel + byte_of(sum)];
    }
};

}  // namespace lynx::frames
