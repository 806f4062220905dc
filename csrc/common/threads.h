// How many threads a parallel region may use, and loops whose iterations are divided among them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace lynx {

// Call this once, when the module is loaded.
void watch_forks();

// `wanted`, or 1 in a process that was forked after this module was loaded. OpenMP's threads do not survive a fork, and
// a child that waits for them hangs.
int usable_threads(int wanted);

// As usable_threads, but no more than there is work for: `bytes` to be read or written. Starting a second thread takes
// some microseconds, in which one thread moves about 64 KiB.
int threads_for_bytes(int64_t bytes, int wanted);

// Calls body(i, scratch) for every i from 0 to count - 1, on at most `threads` threads. Each thread takes the next i
// that no other one has taken. It owns the `scratch_bytes` bytes at `scratch`, 64-byte aligned. `body` must not throw.
void parallel_for(int64_t count, int threads, size_t scratch_bytes, const std::function<void(int64_t, void*)>& body);

}  // namespace lynx
