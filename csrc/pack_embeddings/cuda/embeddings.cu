// architectures: sm_80 sm_90 sm_100
// pack_embeddings, as an operator of torch on a GPU. Python has checked shapes, dtypes and devices. The kernels check
// indices.
#include "common/torch_library.h"
#include "launches.h"

namespace lynx::embeddings {
namespace {

Rows rows_of(const Tensor& tensor) { return {tensor.data_ptr(), dtype_of(tensor), tensor.size(0), tensor.stride(0)}; }

Tensor pack_embeddings(const Tensor& token_ids, const Tensor& embedding, const Tensor& vision,
                       const Tensor& vision_index) {
    const int64_t width = embedding.size(1);
    Tensor out = torch::stable::new_empty(embedding, {token_ids.size(0), width});
    pack_rows(static_cast<const int64_t*>(token_ids.const_data_ptr()),
              static_cast<const int32_t*>(vision_index.const_data_ptr()), rows_of(embedding), rows_of(vision),
              rows_of(out), width, OnDevice(embedding));
    return out;
}

Tensor pack_embeddings_backward(const Tensor& grad, const Tensor& vision_index, int64_t num_vision,
                                torch::headeronly::ScalarType dtype) {
    Tensor out = torch::stable::new_empty(grad, {num_vision, grad.size(1)}, dtype);
    Tensor uses = torch::stable::new_zeros(vision_index, {2, num_vision});
    sum_rows(rows_of(grad), static_cast<const int32_t*>(vision_index.const_data_ptr()),
             static_cast<int32_t*>(uses.mutable_data_ptr()), rows_of(out), grad.size(1), OnDevice(grad));
    return out;
}

}  // namespace
}  // namespace lynx::embeddings

STABLE_TORCH_LIBRARY_FRAGMENT(lynx_kernels_cuda, library) {
    library.def(
        "pack_embeddings(Tensor token_ids, Tensor embedding, Tensor vision, Tensor vision_index) -> Tensor");
    library.def(
        "pack_embeddings_backward(Tensor grad, Tensor vision_index, int num_vision, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lynx_kernels_cuda, CUDA, library) {
    library.impl("pack_embeddings", TORCH_BOX(&lynx::embeddings::pack_embeddings));
    library.impl("pack_embeddings_backward", TORCH_BOX(&lynx::embeddings::pack_embeddings_backward));
}
