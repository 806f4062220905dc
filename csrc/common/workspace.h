// The working memory of a kernel, cut from one block. Cutting a null block tells how many bytes are needed.
#pragma once

#include "vector.h"

namespace {

class Workspace {
   public:
    explicit Workspace(void* block) : block_(static_cast<char*>(block)) {}

    // Memory for `count` items, 64-byte aligned.
    template <class Item>
    Item* take(int64_t count) {
        char* begin = block_ == nullptr ? nullptr : block_ + bytes_;
        bytes_ += round_up(count * static_cast<int64_t>(sizeof(Item)), 64);
        return reinterpret_cast<Item*>(begin);
    }

    size_t bytes() const { return bytes_; }

   private:
    char* block_;
    size_t bytes_ = 0;
};

}  // namespace
