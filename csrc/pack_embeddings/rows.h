// A tensor of two dimensions, for the CPU and CUDA code of pack_embeddings.
#pragma once

#include "common/numbers.h"

namespace lynx::embeddings {

// The columns of a row are contiguous.
struct Rows {
    void* data;
    Dtype dtype;
    int64_t count, stride;  // the stride in elements
};

}  // namespace lynx::embeddings
