// Working memory that lives as long as a call.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace lynx {

struct Free {
    void operator()(void* block) const { free(block); }
};

using Memory = std::unique_ptr<char, Free>;

// `bytes` uninitialised bytes, 64-byte aligned. Throws std::bad_alloc. So call it before the threads start: no
// exception may leave a thread.
inline Memory allocate(size_t bytes) {
    Memory memory(static_cast<char*>(aligned_alloc(64, (bytes + 64) / 64 * 64)));
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

}  // namespace lynx
