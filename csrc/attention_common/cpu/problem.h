// What a call of attention is, for the kernels and their callers. Plain data, pointers and sizes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lynx::attention {

// Consecutive queries that see keys by one rule. They see all keys of the shared range. Of their own range [own_begin,
// own_end), query q sees the keys before full_end and the keys up to q. Either range may be empty.
struct Run {
    int64_t first_query, last_query;
    int64_t shared_begin, shared_end;
    int64_t own_begin, own_end, full_end;
};

// Consecutive keys. No tile crosses the end of a range that a run sees. So a run sees all of a tile, none of it, or the
// part that its causal rule says.
struct Tile {
    int64_t begin, end;
};

// What one thread does at a time, for each key head: some runs times some tiles. In forward these are all tiles of the
// group, in backward all runs of it.
struct Task {
    int64_t first_run, last_run;
    int64_t first_tile, last_tile;
    int64_t split;  // of the group's keys, if backward splits them
    bool is_split;
    double cost;
};

// (rows, heads, head_dim). The head dimension is contiguous; strides are in elements.
struct Matrix {
    void* data;
    int64_t row_stride, head_stride;
};

struct Problem {
    const Run* runs;
    const Tile* tiles;
    int64_t num_queries, num_keys, num_heads, num_kv_heads, head_dim;
    float scale;
    bool is_bfloat16;  // else fp32
    Matrix q, k, v;
    Matrix out;         // forward writes it and lse, backward reads both
    float* lse;         // (num_queries, num_heads)
    Matrix dout;        // the gradient of the output
    const float* dlse;  // (num_queries, num_heads), or null for 0
    Matrix dq, dk, dv;
    float* dq_splits;  // (num_splits, num_queries, num_heads, head_dim), of groups whose keys are split
};

// The kernels of one instruction set. A task needs `scratch_bytes` bytes at `scratch`, 64-byte aligned.
struct Kernels {
    size_t (*forward_scratch_bytes)(const Problem&, const Task&);
    void (*forward)(const Problem&, const Task&, int64_t kv_head, void* scratch);
    size_t (*backward_scratch_bytes)(const Problem&, const Task&);
    void (*backward)(const Problem&, const Task&, int64_t kv_head, void* scratch);
};

constexpr int64_t kForwardBlockN = 128, kBackwardBlockN = 64;  // keys of a tile, at most

}  // namespace lynx::attention
