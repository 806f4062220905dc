// What a call of attention is, in the terms that the kernels and their callers share. Plain data, pointers and sizes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lynx {

// Consecutive queries that see keys by one rule: all of the shared range, and of their own range [own_begin, own_end)
// what stands before full_end, or before or at the query itself. Either range may be empty.
struct Run {
    int64_t first_query, last_query;
    int64_t shared_begin, shared_end;
    int64_t own_begin, own_end, full_end;
};

// Consecutive keys. No tile crosses the end of a range that a run sees, so that a run sees all of a tile, nothing of
// it, or a part that its causal rule says.
struct Tile {
    int64_t begin, end;
};

// What one thread does at a time, once for every key head: some runs, some tiles that nothing else in the unit's
// work reads (forward: all tiles of the group; backward: all runs of the group).
struct Unit {
    int64_t first_run, last_run;
    int64_t first_tile, last_tile;
    int64_t part;  // of the group's keys, in a backward that is split over them
    bool is_split;
    double cost;
};

// (rows, heads, head_dim) whose head dimension is contiguous; strides in elements.
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
    Matrix out;             // written by forward, read by backward; so is lse
    float* lse;             // (num_queries, num_heads)
    Matrix grad;            // of the output
    const float* grad_lse;  // (num_queries, num_heads), or null for 0
    Matrix grad_q, grad_k, grad_v;
    float* partial_grad_q;  // (parts, num_queries, num_heads, head_dim), of groups whose keys are split
};

// One instruction set's kernels. `scratch_bytes` is what a unit needs at `scratch`, 64-byte aligned.
struct Kernels {
    size_t (*forward_scratch_bytes)(const Problem&, const Unit&);
    void (*forward)(const Problem&, const Unit&, int64_t kv_head, void* scratch);
    size_t (*backward_scratch_bytes)(const Problem&, const Unit&);
    void (*backward)(const Problem&, const Unit&, int64_t kv_head, void* scratch);
};

constexpr int64_t kForwardTile = 128, kBackwardTile = 64;  // keys a tile, at most

}  // namespace lynx
