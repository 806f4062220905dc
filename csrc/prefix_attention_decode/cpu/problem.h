// What a call of prefix_attention_decode is, for the kernels and their caller. Plain data, pointers and sizes.
//
// Keys that stand together are a segment: those of a root, or a branch's own. A segment is cut into splits. For every
// split, key head and row there is a partial result, and combining a row's partial results gives its output. The rows
// of a segment are numbered branch after branch, query after query, head after head of those that share the key head.
#pragma once

#include "attention_common/cpu/problem.h"

namespace lynx::decode {

using attention::Matrix;

// (entries, rows, heads, head_dim). The head dimension is contiguous; strides are in elements.
struct Cache {
    Matrix first;  // entry
    int64_t stride;
};

// (count,) int32 or int64.
struct Index {
    const void* data;
    bool is_int64;
};

struct Segment {
    Matrix k, v;
    int64_t num_keys;
    bool is_causal;  // the last query sees all keys, the one before it one less, and so on; else every query sees all
    const int64_t* branches;
    int64_t num_branches;
    int64_t num_splits, split_keys;  // 0 without keys or branches
    int64_t first_result;            // the index of the first of its (num_splits, num_kv_heads, rows) results
};

struct Split {
    const Segment* segment;
    int64_t index, first_key, last_key;
};

// The segments that a branch reads, and its place among the branches of its root.
struct Sources {
    const Segment *root, *own;
    int64_t place_in_root;
};

struct Problem {
    int64_t num_branches, num_roots, num_queries, num_heads, num_kv_heads, head_dim;  // num_queries: of a branch
    int64_t root_capacity, branch_capacity;                                           // keys an entry has room for
    float scale;
    bool is_bfloat16;  // else fp32
    Cache q;           // (branches, queries, heads, head_dim)
    Cache root_k, root_v, branch_k, branch_v;
    Index branch_to_root, root_lengths, branch_lengths;
    void* out;   // (branches, queries, heads, head_dim), contiguous
    float* lse;  // (branches, queries, heads)
    // forward() fills in what follows: what each branch reads, and the partial results. softmax(s) v is acc / row_sum.
    const Sources* sources;
    float* acc;      // (results, acc_stride)
    float* row_sum;  // (results,)
    float* row_max;  // (results,)
    int64_t acc_stride;

    int64_t rows_of_branch() const { return num_queries * (num_heads / num_kv_heads); }
};

// The kernels of one instruction set. A segment's splits need `scratch_bytes` bytes at `scratch`, 64-byte aligned.
struct Kernels {
    size_t (*scratch_bytes)(const Problem&, const Segment&);
    void (*attend)(const Problem&, const Split&, int64_t first_kv_head, int64_t last_kv_head, void* scratch);
    void (*combine)(const Problem&, int64_t branch);
};

constexpr int64_t kBlockN = 32;     // keys of a tile, at most; a split is a multiple of it
constexpr int64_t kMaxSplits = 16;  // of a segment

}  // namespace lynx::decode
