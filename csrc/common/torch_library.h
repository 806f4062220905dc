// What every file of CUDA kernels needs of torch: only its stable ABI, so that one build serves torch 2.11 and later.
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

// The stream that torch is using on a device. Asked for by name at run time: a library that needed the symbol itself
// could not be loaded beside a torch without CUDA.
cudaStream_t current_stream(int device);

int multiprocessors_of(int device);

Dtype dtype_of(const Tensor& tensor);

// Runs kernels on the stream of a tensor's device.
class OnDevice {
   public:
    explicit OnDevice(const Tensor& tensor)
        : device_(tensor.get_device_index()), guard_(device_), stream_(current_stream(device_)) {}

    // How many the device has: what a launch that shall occupy it is cut by.
    int multiprocessors() const { return multiprocessors_of(device_); }

    template <class Kernel>
    void operator()(Kernel, const typename Kernel::Args& args, int blocks) const {
        run_kernel<Kernel><<<blocks, Kernel::kThreads, 0, stream_>>>(args);
        const cudaError_t error = cudaGetLastError();
        STD_TORCH_CHECK(error == cudaSuccess, "lynx_kernels: a CUDA kernel was not launched: ",
                        cudaGetErrorString(error));
    }

   private:
    int device_;
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_;
};

}  // namespace lynx
