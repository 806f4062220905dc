#include "torch_library.h"

#include <dlfcn.h>

namespace lynx {

cudaStream_t current_stream(int device) {
    using Ask = AOTITorchError (*)(int32_t device, void** stream);
    static const Ask ask = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library == nullptr ? nullptr
                                  : reinterpret_cast<Ask>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    void* stream = nullptr;
    STD_TORCH_CHECK(ask != nullptr && ask(device, &stream) == 0,
                    "lynx_kernels: this torch has no CUDA stream to run a kernel on");
    return static_cast<cudaStream_t>(stream);
}

int multiprocessors_of(int device) {
    int count = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    STD_TORCH_CHECK(error == cudaSuccess, "lynx_kernels: a GPU does not tell how many multiprocessors it has: ",
                    cudaGetErrorString(error));
    return count;
}

Dtype dtype_of(const Tensor& tensor) {
    using torch::headeronly::ScalarType;
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Dtype::kFloat;
        case ScalarType::Half: return Dtype::kHalf;
        case ScalarType::BFloat16: return Dtype::kBFloat16;
        default: STD_TORCH_CHECK(false, "lynx_kernels: a CUDA kernel was given a dtype that is not fp32, fp16 or bf16");
    }
}

}  // namespace lynx
