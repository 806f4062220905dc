// Which kernels a call of pack_frames launches. The caller runs each by `run(Kernel(), args, blocks)`.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "common/integers.h"
#include "kernels.h"

namespace lynx::frames {

// `frames` are cut to their boxes. Elements of `levels` and `out` have `element_size` bytes.
struct Call {
    std::vector<Frame> frames;
    std::vector<Resizing> resizings;  // of each frame
    Grid grid;
    int64_t element_size;
    const void* levels;
    void* out;
};

// The filters of all sides, each once.
class Filters {
   public:
    int64_t offset_of(const Side& side) {
        for (const FilterPlace& each : places_)
            if (each.side.length == side.length && each.side.resized == side.resized && each.side.start == side.start &&
                each.side.count == side.count)
                return each.offset;
        places_.push_back({side, length_});
        length_ += (2 + max_inputs(side)) * side.count;
        return places_.back().offset;
    }

    int64_t length() const { return length_; }

    template <class Run>
    void fill(int32_t* filters, Run& run) const {
        FillFilters::Args args = {};
        args.filters = filters;
        int64_t outputs = 0;
        for (const FilterPlace& each : places_) outputs = std::max(outputs, each.side.count);
        args.blocks_of_a_filter = static_cast<int>(divide_up(outputs, FillFilters::kThreads));
        for (size_t first = 0; first < places_.size(); first += kFiltersOfALaunch) {
            const int count = static_cast<int>(std::min<size_t>(kFiltersOfALaunch, places_.size() - first));
            std::copy_n(places_.begin() + first, count, args.places);
            run(FillFilters(), args, count * args.blocks_of_a_filter);
        }
    }

   private:
    int64_t length_ = 0;
    std::vector<FilterPlace> places_;
};

template <class Element, int kItems, class Run>
void copy_frames(const Call& call, const Frame* frames, int count, Element* out, Run& run) {
    using Kernel = CopyFrames<Element, kItems>;
    typename Kernel::Args args = {};
    std::copy_n(frames, count, args.frames);
    args.levels = static_cast<const Element*>(call.levels);
    args.out = out;
    args.grid = call.grid;
    args.blocks_of_a_frame = static_cast<int>(divide_up(3 * call.grid.height * call.grid.width, Kernel::kOutputs));
    run(Kernel(), args, count * args.blocks_of_a_frame);
}

// What makes the pixels of a frame: a copy, or a resize by both passes in one order or the other.
enum class Way { kCopy, kHorizontalFirst, kVerticalFirst };

// Whether the result is a part of the frame without resizing. If so, moves the start of `frame` to its first pixel.
inline bool starts_at_result(Frame& frame, const Side& rows, const Side& columns) {
    if (rows.resized != rows.length || columns.resized != columns.length) return false;
    const int64_t column = frame.is_flipped ? columns.start + columns.count - 1 : columns.start;
    frame.data += rows.start * frame.row_stride + column * frame.column_stride;
    if (frame.is_flipped) frame.column_stride = -frame.column_stride;
    return true;
}

inline Frame transposed(const Frame& frame) {
    return {frame.data,         frame.column_stride, frame.row_stride, frame.channel_stride,
            frame.width,        frame.height,        frame.is_flipped};
}

// Consecutive frames that take the same kernel are launched together, at most kFramesOfALaunch of them.
template <class Element, class Run, class Allocate>
void pack_frames_of(const Call& call, Run& run, Allocate allocate) {
    using Resize = ResizeFrames<Element>;
    constexpr int kItems = 16 / sizeof(Element);
    const Grid& grid = call.grid;
    const int64_t outputs = 3 * grid.height * grid.width;
    Filters filters;
    std::vector<typename Resize::Job> jobs;
    std::vector<Way> ways;
    for (size_t i = 0; i < call.frames.size(); i++) {
        Frame frame = call.frames[i];
        const auto& [rows, columns, is_vertical_first] = call.resizings[i];
        if (starts_at_result(frame, rows, columns)) {
            ways.push_back(Way::kCopy);
            jobs.push_back({frame, 0, 0});
        } else if (is_vertical_first) {
            ways.push_back(Way::kVerticalFirst);
            jobs.push_back({transposed(frame), filters.offset_of(columns), filters.offset_of(rows)});
        } else {
            ways.push_back(Way::kHorizontalFirst);
            jobs.push_back({frame, filters.offset_of(rows), filters.offset_of(columns)});
        }
    }
    typename Resize::Args args = {};
    int32_t* memory = filters.length() == 0 ? nullptr : allocate(filters.length());
    filters.fill(memory, run);
    args.filters = memory;
    args.levels = static_cast<const Element*>(call.levels);
    args.grid = grid;
    const bool is_aligned = reinterpret_cast<uintptr_t>(call.out) % 16 == 0 && outputs % kItems == 0;
    for (size_t first = 0, end; first < jobs.size(); first = end) {
        end = first + 1;
        while (end < jobs.size() && end < first + kFramesOfALaunch && ways[end] == ways[first]) end++;
        const int count = static_cast<int>(end - first);
        Element* out = static_cast<Element*>(call.out) + first * outputs;
        if (ways[first] == Way::kCopy) {
            Frame frames[kFramesOfALaunch];
            for (int i = 0; i < count; i++) frames[i] = jobs[first + i].frame;
            if (is_aligned)
                copy_frames<Element, kItems>(call, frames, count, out, run);
            else
                copy_frames<Element, 1>(call, frames, count, out, run);
        } else {
            std::copy_n(jobs.begin() + first, count, args.jobs);
            args.out = out;
            args.is_transposed = ways[first] == Way::kVerticalFirst;
            args.rows = static_cast<int>(args.is_transposed ? grid.width : grid.height);
            args.columns = static_cast<int>(args.is_transposed ? grid.height : grid.width);
            args.tiles_of_a_row = static_cast<int>(divide_up(args.columns, Resize::kColumns));
            args.tiles_of_a_frame = args.tiles_of_a_row * static_cast<int>(divide_up(args.rows, Resize::kRows));
            run(Resize(), args, count * args.tiles_of_a_frame);
        }
    }
}

// `allocate(count)` gives memory for so many int32, which lasts as long as the kernels run.
template <class Run, class Allocate>
void pack_frames(const Call& call, Run run, Allocate allocate) {
    // The kernels count offsets inside a launch in ints.
    if (3 * call.grid.height * call.grid.width > INT32_MAX / kFramesOfALaunch)
        throw std::invalid_argument("pack_frames: the CUDA kernels make frames of up to 22369621 pixels");
    if (call.element_size == 2)
        pack_frames_of<uint16_t>(call, run, allocate);
    else if (call.element_size == 4)
        pack_frames_of<uint32_t>(call, run, allocate);
    else
        pack_frames_of<uint64_t>(call, run, allocate);
}

}  // namespace lynx::frames
