// What every file of CUDA kernels needs from torch. It is only the stable ABI, so one build works with torch 2.11 and
// later.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "numbers.h"
#include "phases.h"

namespace lynx {

using torch::stable::Tensor;

// The stream that torch uses on a device. The function is looked up by name at run time: a library that linked to it
// could not be loaded into a torch without CUDA.
cudaStream_t current_stream(int device);

int multiprocessors_of(int device);

Dtype dtype_of(const Tensor& tensor);

// Runs kernels on the stream of a tensor's device.
class OnDevice {
   public:
    explicit OnDevice(const Tensor& tensor)
        : device_(tensor.get_device_index()), guard_(device_), stream_(current_stream(device_)) {}

    int multiprocessors() const { return multiprocessors_of(device_); }

    template <class Kernel>
    void operator()(Kernel, const typename Kernel::Args& args, int blocks) const {
        Kernel::global()<<<blocks, Kernel::kThreads, 0, stream_>>>(args);
        const cudaError_t error = cudaGetLastError();
        STD_TORCH_CHECK(error == cudaSuccess, "lynx_kernels: ", Kernel::name(), " could not be launched: ",
                        cudaGetErrorString(error));
    }

   private:
    int device_;
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_;
};

}  // namespace lynx
