// What a call of attention is, for the kernels and their callers. Plain data, pointers and sizes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lynx::attention {

// Consecutive queries, of one run of a PackedLayout or one segment of a SpanLayout.
struct Run {
    int64_t first_query, last_query;
    int64_t key_begin, key_end;  // of a segment's span; of a run, all keys
    int64_t id;                  // of the run, also in parts of it
    int64_t row;                 // of its first query in the scratch, counted from the plan's first run; even
};

// Consecutive keys. If a query sees keys of the tile, it sees all of them, but for those that its own run's order hides
// and those that lie before its window.
struct Tile {
    int64_t begin, end;
    int64_t run;                      // whose rows the keys are; -1 in a SpanLayout
    int64_t offset;                   // row number minus place along the path
    int64_t first_query, last_query;  // the only queries that may see it
};

// What one thread does at a time, for each key head: some runs times some tiles. In forward these are all tiles that the
// runs see, in backward all runs that see the tiles. Runs are sorted by queries, or no tile has a query interval.
struct Task {
    int64_t first_run, last_run;
    int64_t first_tile, last_tile;
    int64_t split;  // of the group's keys, if backward splits them
    bool is_split;
    double cost;
};

// (rows, heads, head_dim or value_dim). The head dimension is contiguous; strides are in elements.
struct Matrix {
    void* data;
    int64_t row_stride, head_stride;
};

struct Problem {
    const Run* runs;
    const Tile* tiles;
    const int32_t* see_end;  // (num_queries,): of its own run a query sees the keys before it; null: all
    const int32_t* floor;    // (num_queries,): a query sees no key before this place along the path; null: no such rule
    int64_t num_queries, num_keys, num_heads, num_kv_heads, head_dim, value_dim;
    float scale;
    float softcap;       // 0: none
    const float* sinks;  // (num_heads,), or null
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
