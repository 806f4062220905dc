// Work on units of queries and keys, each once for every key head, shared out among threads.
#pragma once

#include <algorithm>

#include "common/threads.h"

namespace lynx {

// work(unit, first_head, last_head, scratch) for all units and key heads. A thread takes several heads of a unit in a
// row, where units are many, since each head asks ahead for what the next one reads.
template <class Work>
void share_out_heads(int64_t units, int64_t kv_heads, int threads, size_t scratch_bytes, Work work) {
    const int64_t in_a_row = std::clamp<int64_t>(units * kv_heads / (8 * usable_threads(threads)), 1, kv_heads);
    const int64_t rows = (kv_heads + in_a_row - 1) / in_a_row;
    share_out(units * rows, threads, scratch_bytes, [&](int64_t i, void* scratch) {
        const int64_t first = i % rows * in_a_row;
        work(i / rows, first, std::min(first + in_a_row, kv_heads), scratch);
    });
}

}  // namespace lynx
