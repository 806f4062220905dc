// How many threads a parallel region may use, and work that is shared out among them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace lynx {

// To be called once, when the module is loaded.
void watch_forks();

// `wanted`, or 1 in a process that was forked from one that had loaded this module: OpenMP's threads do not survive a
// fork, and a child that waits for them hangs.
int usable_threads(int wanted);

// work(i, scratch) for every i from 0 to count - 1 on at most `threads` threads: each takes the next i that none has, and
// owns `scratch_bytes` at `scratch`, 64-byte aligned. `work` must not throw.
void share_out(int64_t count, int threads, size_t scratch_bytes, const std::function<void(int64_t, void*)>& work);

}  // namespace lynx
