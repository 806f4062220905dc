// architectures: sm_80 sm_90 sm_100
#include "torch_library.h"

#include <dlfcn.h>

namespace lynx {

cudaStream_t current_stream(int device) {
    using GetStream = AOTITorchError (*)(int32_t device, void** stream);
    static const GetStream get_stream = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library == nullptr ? nullptr
                                  : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    void* stream = nullptr;
    STD_TORCH_CHECK(get_stream != nullptr && get_stream(device, &stream) == 0,
                    "lynx_kernels: torch gives no CUDA stream for device ", device, ": install a torch built for CUDA");
    return static_cast<cudaStream_t>(stream);
}

int multiprocessors_of(int device) {
    int count = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    STD_TORCH_CHECK(error == cudaSuccess, "lynx_kernels: the number of multiprocessors of device ", device,
                    " is unknown: ", cudaGetErrorString(error));
    return count;
}

Dtype dtype_of(const Tensor& tensor) {
    using torch::headeronly::ScalarType;
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Dtype::kFloat;
        case ScalarType::Half: return Dtype::kHalf;
        case ScalarType::BFloat16: return Dtype::kBFloat16;
        default:
            STD_TORCH_CHECK(false, "lynx_kernels: the CUDA kernels take fp32, fp16 and bf16, and were given another dtype");
    }
}

}  // namespace lynx
