// A parallel loop over tasks and key heads.
#pragma once

#include <algorithm>

#include "common/integers.h"
#include "common/threads.h"

namespace lynx {

// Calls body(task, first_head, last_head, scratch) until every task was done for every key head. If there are many
// tasks, a thread takes several heads of a task in a row, because each head prefetches what the next one reads.
template <class Body>
void parallel_for_heads(int64_t tasks, int64_t kv_heads, int threads, size_t scratch_bytes, Body body) {
    const int64_t in_a_row = std::clamp<int64_t>(tasks * kv_heads / (8 * usable_threads(threads)), 1, kv_heads);
    const int64_t rows = divide_up(kv_heads, in_a_row);
    parallel_for(tasks * rows, threads, scratch_bytes, [&](int64_t i, void* scratch) {
        const int64_t first = i % rows * in_a_row;
        body(i / rows, first, std::min(first + in_a_row, kv_heads), scratch);
    });
}

}  // namespace lynx
