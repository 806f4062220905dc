// The frame kernels of one instruction set. Compiled once for each, with LYNX_KERNELS the name of the result.
#include "normalise.h"
#include "resize.h"

namespace {

using lynx::frames::ElementType;
using lynx::frames::Problem;
using lynx::frames::Unit;

struct Scratch {
    int64_t rows, stride;
    uint8_t* strip;      // (rows, 3, stride): bytes of the square
    uint8_t* patches;    // (patches, 3, rows, patch_size): the same in the order of the output
    uint8_t* unmirrored;  // (3, stride)

    Scratch(Cutter& cutter, const Problem& problem)
        : rows(smaller(lynx::frames::kStripRows, problem.patch_size)), stride(round_up(problem.size, kWidth)) {
        strip = cutter.take<uint8_t>(rows * 3 * stride + kChunk);
        patches = cutter.take<uint8_t>(rows * 3 * problem.size + kChunk);
        unmirrored = cutter.take<uint8_t>(3 * stride);
    }
};

size_t scratch_bytes(const Problem& problem, const Unit& unit) {
    Cutter cutter(nullptr);
    Scratch scratch(cutter, problem);
    if (unit.row_filter != nullptr) ResizeScratch resize_scratch(cutter, unit, scratch.stride);
    return cutter.used();
}

void copy_row(const Problem& problem, const Unit& unit, int64_t row, const Scratch& scratch, uint8_t* to) {
    const int64_t stride = scratch.stride;
    uint8_t* first = unit.frame->is_flipped ? scratch.unmirrored : to;
    read_row(*unit.frame, unit.top + row, unit.left, problem.size, {first, first + stride, first + 2 * stride});
    if (unit.frame->is_flipped)
        for (int channel = 0; channel < 3; channel++)
            mirror(first + channel * stride, problem.size, to + channel * stride);
}

// The rows of a strip, cut into patches, as numbers.
template <class Element>
void write_strip(const Problem& problem, const Unit& unit, int64_t row, int64_t rows, bool computes_levels,
                 const uint8_t* patches) {
    const int64_t size = problem.size, patch_size = problem.patch_size;
    Element* out = static_cast<Element*>(problem.out) + unit.out_offset;
    for (int64_t column = 0; column < size; column += patch_size)
        for (int channel = 0; channel < 3; channel++) {
            Element* to = out + lynx::frames::patch_offset(channel, row, column, size, patch_size);
            normalise(problem, channel, computes_levels, patches, rows * patch_size, to);
            patches += rows * patch_size;
        }
}

void run(const Problem& problem, const Unit& unit, bool computes_levels, void* block) {
    Cutter cutter(block);
    Scratch scratch(cutter, problem);
    auto finish = [&](int64_t row, int64_t rows) {
        cut_patches(scratch.strip, rows, scratch.stride, problem.size, problem.patch_size, scratch.patches);
        switch (problem.type) {
            case ElementType::kFloat64:
                return write_strip<double>(problem, unit, row, rows, computes_levels, scratch.patches);
            case ElementType::kFloat32:
                return write_strip<float>(problem, unit, row, rows, computes_levels, scratch.patches);
            case ElementType::kFloat16:
                return write_strip<uint16_t>(problem, unit, row, rows, computes_levels, scratch.patches);
            case ElementType::kBFloat16:
                return write_strip<BFloat16>(problem, unit, row, rows, computes_levels, scratch.patches);
        }
    };
    auto run_strips = [&](auto make_row) {
        for (int64_t row = unit.first_row; row < unit.last_row;) {
            const int64_t end = lynx::frames::strip_end(row, problem.patch_size);
            for (int64_t i = row; i < end; i++) make_row(i, scratch.strip + (i - row) * 3 * scratch.stride);
            finish(row, end - row);
            row = end;
        }
    };
    if (unit.row_filter == nullptr)
        return run_strips([&](int64_t row, uint8_t* to) { copy_row(problem, unit, row, scratch, to); });
    ResizeScratch resize_scratch(cutter, unit, scratch.stride);
    Resizer resizer(unit, resize_scratch);
    run_strips([&](int64_t row, uint8_t* to) { resizer.row(row, to); });
}

}  // namespace

namespace lynx::frames {

extern const Kernels LYNX_KERNELS = {kWeightWords, pack_weights, computes_levels, scratch_bytes, run};

}  // namespace lynx::frames
