// The frame kernels of one instruction set. Compiled once for each, with LYNX_KERNELS the name of the result.
#include "normalise.h"
#include "resize.h"

namespace {

using lynx::Dtype;
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

// The rows of a strip, cut into patches, as numbers: normalise(channel, bytes, count, to).
template <class Element, class Normalise>
LYNX_INLINE void write_strip(const Problem& problem, const Unit& unit, int64_t row, int64_t rows,
                             const uint8_t* patches, Normalise normalise) {
    const int64_t patch_size = problem.patch_size, count = rows * patch_size;
    Element* to = static_cast<Element*>(problem.out) + unit.out_offset +
                  lynx::frames::patch_offset(0, row, 0, problem.size, patch_size);
    for (int64_t column = 0; column < problem.size; column += patch_size)
        for (int channel = 0; channel < 3; channel++) {
            normalise(channel, patches, count, to);
            patches += count;
            to += patch_size * patch_size;
        }
}

template <class Element>
void look_up_strip(const Problem& problem, const Unit& unit, int64_t row, int64_t rows, const uint8_t* patches) {
    const Element* levels = static_cast<const Element*>(problem.levels);
    write_strip<Element>(problem, unit, row, rows, patches, [&](int channel, auto... run) {
        look_up(levels + 256 * channel, run...);
    });
}

#if defined(__AVX2__)
template <class Element>
void compute_strip(const Problem& problem, const Unit& unit, int64_t row, int64_t rows, const uint8_t* patches) {
    const Computed computed[3] = {{problem.mean[0], problem.std[0]},
                                  {problem.mean[1], problem.std[1]},
                                  {problem.mean[2], problem.std[2]}};
    write_strip<Element>(problem, unit, row, rows, patches,
                         [&](int channel, auto... run) { computed[channel](run...); });
}
#endif

void finish_strip(const Problem& problem, const Unit& unit, int64_t row, int64_t rows,
                  [[maybe_unused]] bool computes_levels, const uint8_t* patches) {
#if defined(__AVX2__)
    if (computes_levels && rows * problem.patch_size >= kWidth) {
        if (problem.dtype == Dtype::kFloat) return compute_strip<float>(problem, unit, row, rows, patches);
        return compute_strip<BFloat16>(problem, unit, row, rows, patches);
    }
#endif
    switch (problem.dtype) {
        case Dtype::kDouble: return look_up_strip<uint64_t>(problem, unit, row, rows, patches);
        case Dtype::kFloat: return look_up_strip<uint32_t>(problem, unit, row, rows, patches);
        default: return look_up_strip<uint16_t>(problem, unit, row, rows, patches);
    }
}

void run(const Problem& problem, const Unit& unit, bool computes_levels, void* block) {
    Cutter cutter(block);
    Scratch scratch(cutter, problem);
    auto finish = [&](int64_t row, int64_t rows) {
        cut_patches(scratch.strip, rows, scratch.stride, problem.size, problem.patch_size, scratch.patches);
        finish_strip(problem, unit, row, rows, computes_levels, scratch.patches);
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
