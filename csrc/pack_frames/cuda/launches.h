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
    int64_t size, patch_size;
    bool is_exact, rounds_down;
    int64_t element_size;
    const void* levels;
    void* out;
};

// The filters of all sides, each once.
class Filters {
   public:
    explicit Filters(int64_t size) : size_(size) {}

    int64_t offset_of(const Side& side) {
        for (const FilterPlace& each : places_)
            if (each.length == side.length && each.resized == side.resized) return each.offset;  // so are the starts
        places_.push_back({side.length, side.resized, side.start, length_});
        length_ += (2 + max_inputs(side)) * size_;
        return places_.back().offset;
    }

    int64_t length() const { return length_; }

    template <class Run>
    void fill(int32_t* filters, Run& run) const {
        FillFilters::Args args = {};
        args.filters = filters;
        args.size = static_cast<int>(size_);
        args.blocks_of_a_filter = static_cast<int>(divide_up(size_, FillFilters::kThreads));
        for (size_t first = 0; first < places_.size(); first += kFiltersOfALaunch) {
            const int count = static_cast<int>(std::min<size_t>(kFiltersOfALaunch, places_.size() - first));
            std::copy_n(places_.begin() + first, count, args.places);
            run(FillFilters(), args, count * args.blocks_of_a_filter);
        }
    }

   private:
    int64_t size_, length_ = 0;
    std::vector<FilterPlace> places_;
};

template <class Element, int kItems, class Run>
void copy_frames(const Call& call, const Frame* frames, int count, Element* out, Run& run) {
    using Kernel = CopyFrames<Element, kItems>;
    typename Kernel::Args args = {};
    std::copy_n(frames, count, args.frames);
    args.levels = static_cast<const Element*>(call.levels);
    args.out = out;
    args.size = static_cast<int>(call.size);
    args.patch_size = static_cast<int>(call.patch_size);
    args.blocks_of_a_frame = static_cast<int>(divide_up(3 * args.size * args.size, Kernel::kOutputs));
    run(Kernel(), args, count * args.blocks_of_a_frame);
}

// Whether the square is a part of the frame without resizing. If so, moves the start of `frame` to its first pixel.
inline bool starts_at_square(Frame& frame, const Side& rows, const Side& columns) {
    if (rows.resized != rows.length || columns.resized != columns.length) return false;
    const int64_t column = frame.is_flipped ? columns.start + columns.count - 1 : columns.start;
    frame.data += rows.start * frame.row_stride + column * frame.column_stride;
    if (frame.is_flipped) frame.column_stride = -frame.column_stride;
    return true;
}

// Consecutive frames that take the same kernel are launched together, at most kFramesOfALaunch of them.
template <class Element, class Run, class Allocate>
void pack_frames_of(const Call& call, Run& run, Allocate allocate) {
    using Resize = ResizeFrames<Element>;
    constexpr int kItems = 16 / sizeof(Element);
    const int64_t outputs = 3 * call.size * call.size;
    Filters filters(call.size);
    std::vector<typename Resize::Job> jobs;
    std::vector<bool> copies;
    for (Frame frame : call.frames) {
        const int64_t short_side = std::min(frame.height, frame.width);
        auto square = [&](int64_t length) {
            return square_side(length, short_side, call.size, call.is_exact, call.rounds_down);
        };
        const Side rows = square(frame.height), columns = square(frame.width);
        copies.push_back(starts_at_square(frame, rows, columns));
        jobs.push_back({frame, 0, 0});
        if (copies.back()) continue;
        jobs.back().row_filter = filters.offset_of(rows);
        jobs.back().column_filter = filters.offset_of(columns);
    }
    typename Resize::Args args = {};
    int32_t* memory = filters.length() == 0 ? nullptr : allocate(filters.length());
    filters.fill(memory, run);
    args.filters = memory;
    args.levels = static_cast<const Element*>(call.levels);
    args.size = static_cast<int>(call.size);
    args.patch_size = static_cast<int>(call.patch_size);
    args.tiles_of_a_row = static_cast<int>(divide_up(args.size, Resize::kColumns));
    args.tiles_of_a_frame = args.tiles_of_a_row * static_cast<int>(divide_up(args.size, Resize::kRows));
    const bool is_aligned = reinterpret_cast<uintptr_t>(call.out) % 16 == 0 && outputs % kItems == 0;
    for (size_t first = 0, end; first < jobs.size(); first = end) {
        end = first + 1;
        while (end < jobs.size() && end < first + kFramesOfALaunch && copies[end] == copies[first]) end++;
        const int count = static_cast<int>(end - first);
        Element* out = static_cast<Element*>(call.out) + first * outputs;
        if (copies[first]) {
            Frame frames[kFramesOfALaunch];
            for (int i = 0; i < count; i++) frames[i] = jobs[first + i].frame;
            if (is_aligned)
                copy_frames<Element, kItems>(call, frames, count, out, run);
            else
                copy_frames<Element, 1>(call, frames, count, out, run);
        } else {
            std::copy_n(jobs.begin() + first, count, args.jobs);
            args.out = out;
            run(Resize(), args, count * args.tiles_of_a_frame);
        }
    }
}

// `allocate(count)` gives memory for so many int32, which lasts as long as the kernels run.
template <class Run, class Allocate>
void pack_frames(const Call& call, Run run, Allocate allocate) {
    // The kernels count offsets inside a launch in ints.
    if (3 * call.size * call.size > INT32_MAX / kFramesOfALaunch)
        throw std::invalid_argument("pack_frames: the CUDA kernels take sizes up to 4729");
    if (call.element_size == 2)
        pack_frames_of<uint16_t>(call, run, allocate);
    else if (call.element_size == 4)
        pack_frames_of<uint32_t>(call, run, allocate);
    else
        pack_frames_of<uint64_t>(call, run, allocate);
}

}  // namespace lynx::frames
