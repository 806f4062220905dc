// architectures: sm_80 sm_90 sm_100
// pack_frames, as an operator of torch on a GPU. Python has checked shapes, boxes and devices.
#include "common/torch_library.h"
#include "launches.h"

namespace lynx::frames {
namespace {

void pack(const std::vector<Tensor>& frames, const Tensor& out, const Tensor& levels,
          const std::vector<int64_t>& boxes, const std::vector<int64_t>& flips, const std::vector<int64_t>& fits,
          const std::vector<int64_t>& grid, int64_t resample) {
    Call call = {{},
                 {},
                 {grid[0], grid[1], grid[2], grid[3]},
                 static_cast<int64_t>(out.element_size()),
                 levels.const_data_ptr(),
                 out.mutable_data_ptr()};
    for (size_t i = 0; i < frames.size(); i++) {
        const Tensor& frame = frames[i];
        const int64_t* box = boxes.data() + 4 * i;  // top, left, height, width
        const uint8_t* data = static_cast<const uint8_t*>(frame.const_data_ptr());
        call.frames.push_back({data + box[0] * frame.stride(0) + box[1] * frame.stride(1), frame.stride(0),
                               frame.stride(1), frame.stride(2), box[2], box[3], flips[i] != 0});
        call.resizings.push_back(
            resizing_of(call.frames.back(), fits.data() + 5 * i, call.grid, static_cast<Resample>(resample)));
    }
    Tensor filters;  // torch keeps its memory until the kernels on this stream are done
    pack_frames(call, OnDevice(out), [&](int64_t count) {
        filters = torch::stable::new_empty(out, {count}, torch::headeronly::ScalarType::Int);
        return static_cast<int32_t*>(filters.mutable_data_ptr());
    });
}

}  // namespace
}  // namespace lynx::frames

STABLE_TORCH_LIBRARY_FRAGMENT(lynx_kernels_cuda, library) {
    library.def(
        "pack_frames(Tensor[] frames, Tensor(a!) out, Tensor levels, int[] boxes, int[] flips, int[] fits, "
        "int[] grid, int resample) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lynx_kernels_cuda, CUDA, library) {
    library.impl("pack_frames", TORCH_BOX(&lynx::frames::pack));
}
