#include "common/bindings.h"

#include <array>
#include <tuple>
#include <vector>

#include "frames.h"

namespace py = pybind11;

namespace lynx {
namespace {

// A frame is (address, row stride, column stride, channel stride), a box (top, left, height, width).
using FrameView = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
using Box = std::tuple<int64_t, int64_t, int64_t, int64_t>;

frames::Frame cut_out(const FrameView& view, const Box& box, bool is_flipped) {
    const auto [address, row_stride, column_stride, channel_stride] = view;
    const auto [top, left, height, width] = box;
    const uint8_t* first = pointer<uint8_t>(address) + top * row_stride + left * column_stride;
    return {first, row_stride, column_stride, channel_stride, height, width, is_flipped};
}

}  // namespace

void bind_frames(py::module_& module) {
    py::enum_<Dtype>(module, "Dtype")
        .value("float64", Dtype::kDouble)
        .value("float32", Dtype::kFloat)
        .value("float16", Dtype::kHalf)
        .value("bfloat16", Dtype::kBFloat16);
    py::enum_<frames::Resample>(module, "Resample")
        .value("bilinear", frames::Resample::kBilinear)
        .value("bicubic", frames::Resample::kBicubic)
        .value("lanczos", frames::Resample::kLanczos);
    // `fits` are as resizing_of takes them. `grid` is the height and width of the result and of a patch, then merge_size
    // and copies. `levels` (3, 256) and `out` have `dtype`; without levels (0), `out` has bytes. `strides` are
    // the last fields of Problem. Boxes lie inside their frames.
    module.def("pack_frames",
               [](const std::vector<FrameView>& views, const std::vector<Box>& boxes, const std::vector<bool>& flips,
                  const std::vector<std::array<int64_t, 5>>& fits, const std::array<int64_t, 6>& grid, frames::Resample resample,
                  Dtype dtype, uintptr_t levels, const std::array<float, 3>& mean, const std::array<float, 3>& std, uintptr_t out,
                  const std::array<int64_t, 3>& strides, int threads) {
                   const frames::Grid cells = {grid[0], grid[1], grid[2], grid[3]};
                   std::vector<frames::Frame> cut;
                   std::vector<frames::Resizing> resizings;
                   for (size_t i = 0; i < views.size(); i++) {
                       cut.push_back(cut_out(views[i], boxes.at(i), flips.at(i)));
                       resizings.push_back(resizing_of(cut.back(), fits.at(i).data(), cells, resample));
                   }
                   const frames::Problem problem = {cut.data(),
                                                    resizings.data(),
                                                    static_cast<int64_t>(cut.size()),
                                                    cells,
                                                    grid[4],
                                                    grid[5],
                                                    dtype,
                                                    pointer<void>(levels),
                                                    {mean[0], mean[1], mean[2]},
                                                    {std[0], std[1], std[2]},
                                                    pointer<void>(out),
                                                    strides[0],
                                                    strides[1],
                                                    strides[2]};
                   py::gil_scoped_release release;
                   frames::pack_frames(problem, threads);
               });
}

}  // namespace lynx
