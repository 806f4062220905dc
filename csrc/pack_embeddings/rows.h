// What a tensor of two dimensions is to the code of pack_embeddings.
#pragma once

#include "common/numbers.h"

namespace lynx {

// Rows whose columns stand side by side.
struct Rows {
    void* data;
    Dtype dtype;
    int64_t count, stride;  // the stride in elements
};

}  // namespace lynx
