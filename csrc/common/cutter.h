// Working memory of a kernel, cut from one block. With a null block the same cuts tell how much is needed.
#pragma once

#include "vector.h"

namespace {

LYNX_INLINE int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

LYNX_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

class Cutter {
   public:
    explicit Cutter(void* block) : block_(static_cast<char*>(block)) {}

    template <class Item>
    Item* take(int64_t count) {
        char* begin = block_ == nullptr ? nullptr : block_ + used_;
        used_ += round_up(count * static_cast<int64_t>(sizeof(Item)), 64);
        return reinterpret_cast<Item*>(begin);
    }

    size_t used() const { return used_; }

   private:
    char* block_;
    size_t used_ = 0;
};

}  // namespace
