// The frame kernels of one instruction set. This file is compiled once for each, and LYNX_KERNELS names the result.
#include "normalise.h"
#include "resize.h"

namespace {

using lynx::Dtype;
using lynx::frames::Problem;
using lynx::frames::Task;

struct Scratch {
    int64_t rows, stride;
    uint8_t* strip;       // (rows, 3, stride): bytes of the result
    uint8_t* patches;     // (patches, 3, rows, patch_width): the same bytes in the order of the output
    uint8_t* unmirrored;  // (3, stride)

    Scratch(Workspace& workspace, const Problem& problem)
        : rows(min(lynx::frames::kStripRows, problem.grid.patch_height)),
          stride(round_up(problem.grid.width, kWidth)) {
        strip = workspace.take<uint8_t>(rows * 3 * stride + kChunk);
        patches = workspace.take<uint8_t>(rows * 3 * problem.grid.width + kChunk);
        unmirrored = workspace.take<uint8_t>(3 * stride);
    }
};

size_t scratch_bytes(const Problem& problem, const Task& task) {
    Workspace workspace(nullptr);
    Scratch scratch(workspace, problem);
    if (task.row_filter != nullptr) ResizeScratch resize_scratch(workspace, task, scratch.stride);
    return workspace.bytes();
}

void copy_row(const Problem& problem, const Task& task, int64_t row, const Scratch& scratch, uint8_t* to) {
    const int64_t stride = scratch.stride;
    uint8_t* first = task.frame->is_flipped ? scratch.unmirrored : to;
    read_row(*task.frame, task.top + row, task.left, problem.grid.width, {first, first + stride, first + 2 * stride});
    if (task.frame->is_flipped)
        for (int channel = 0; channel < 3; channel++)
            mirror(first + channel * stride, problem.grid.width, to + channel * stride);
}

// The pixels of a strip's patch that stand one after another in the result: all its rows, or one.
int64_t run_length(const Problem& problem, int64_t rows) {
    return problem.row_stride == problem.grid.patch_width ? rows * problem.grid.patch_width : problem.grid.patch_width;
}

// Writes the rows of a strip, cut into patches, as numbers. Calls normalise(channel, bytes, count, to) for each run of
// bytes.
template <class Element, class Normalise>
LYNX_INLINE void write_strip(const Problem& problem, const Task& task, int64_t row, int64_t rows,
                             const uint8_t* patches, Normalise normalise) {
    const lynx::frames::Grid& grid = problem.grid;
    const int64_t count = run_length(problem, rows), copy_size = grid.patch_height * grid.patch_width;
    Element* const out = static_cast<Element*>(problem.out) + task.out_offset;
    for (int64_t column = 0; column < grid.width; column += grid.patch_width) {
        Element* to = out + lynx::frames::place_of(problem, 0, row, column);
        for (int channel = 0; channel < 3; channel++) {
            for (int64_t run = 0; run * count < rows * grid.patch_width; run++) {
                normalise(channel, patches, count, to + run * problem.row_stride);
                patches += count;
            }
            for (int64_t copy = 1; copy < problem.copies; copy++)
                memcpy(to + copy * copy_size, to, count * sizeof(Element));
            to += problem.channel_stride;
        }
    }
}

template <class Element>
void look_up_strip(const Problem& problem, const Task& task, int64_t row, int64_t rows, const uint8_t* patches) {
    const Element* levels = static_cast<const Element*>(problem.levels);
    write_strip<Element>(problem, task, row, rows, patches, [&](int channel, auto... run) {
        look_up(levels + 256 * channel, run...);
    });
}

#if defined(__AVX2__)
template <class Element>
void compute_strip(const Problem& problem, const Task& task, int64_t row, int64_t rows, const uint8_t* patches) {
    const Computed computed[3] = {{problem.mean[0], problem.std[0]},
                                  {problem.mean[1], problem.std[1]},
                                  {problem.mean[2], problem.std[2]}};
    write_strip<Element>(problem, task, row, rows, patches,
                         [&](int channel, auto... run) { computed[channel](run...); });
}
#endif

void finish_strip(const Problem& problem, const Task& task, int64_t row, int64_t rows,
                  [[maybe_unused]] bool computes_levels, const uint8_t* patches) {
#if defined(__AVX2__)
    if (computes_levels && run_length(problem, rows) >= kWidth) {
        if (problem.dtype == Dtype::kFloat) return compute_strip<float>(problem, task, row, rows, patches);
        return compute_strip<BFloat16>(problem, task, row, rows, patches);
    }
#endif
    if (problem.levels == nullptr)
        return write_strip<uint8_t>(
            problem, task, row, rows, patches,
            [](int, const uint8_t* bytes, int64_t count, uint8_t* to) { memcpy(to, bytes, count); });
    switch (problem.dtype) {
        case Dtype::kDouble: return look_up_strip<uint64_t>(problem, task, row, rows, patches);
        case Dtype::kFloat: return look_up_strip<uint32_t>(problem, task, row, rows, patches);
        default: return look_up_strip<uint16_t>(problem, task, row, rows, patches);
    }
}

void run(const Problem& problem, const Task& task, bool computes_levels, void* block) {
    Workspace workspace(block);
    Scratch scratch(workspace, problem);
    auto finish = [&](int64_t row, int64_t rows) {
        cut_patches(scratch.strip, rows, scratch.stride, problem.grid.width, problem.grid.patch_width, scratch.patches);
        finish_strip(problem, task, row, rows, computes_levels, scratch.patches);
    };
    auto run_strips = [&](auto make_row) {
        for (int64_t row = task.first_row; row < task.last_row;) {
            const int64_t end = lynx::frames::strip_end(row, problem.grid.patch_height);
            for (int64_t i = row; i < end; i++) make_row(i, scratch.strip + (i - row) * 3 * scratch.stride);
            finish(row, end - row);
            row = end;
        }
    };
    if (task.row_filter == nullptr)
        return run_strips([&](int64_t row, uint8_t* to) { copy_row(problem, task, row, scratch, to); });
    ResizeScratch resize_scratch(workspace, task, scratch.stride);
    auto resize_by = [&](auto passes) { run_strips([&](int64_t row, uint8_t* to) { passes.row(row, to); }); };
    if (task.is_vertical_first)
        resize_by(VerticalFirst(task, resize_scratch));
    else
        resize_by(HorizontalFirst(task, resize_scratch));
}

}  // namespace

namespace lynx::frames {

extern const Kernels LYNX_KERNELS = {kWeightWords, pack_weights, computes_levels, scratch_bytes, run};

}  // namespace lynx::frames
