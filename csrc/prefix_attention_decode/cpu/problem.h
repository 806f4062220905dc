// What a call of decoding is, in the terms that the kernels and their caller share. Plain data, pointers and sizes.
//
// Keys that stand together are a segment: a root's, or a branch's own. It is cut into parts; of each part and key head
// there is a result for every row that reads it, and merging the results of a row gives its output. Rows are numbered
// branch after branch, query after query, head after head of those that share the key head.
#pragma once

#include "attention_common/cpu/problem.h"

namespace lynx {

// (entries, rows, heads, head_dim) whose head dimension is contiguous; strides in elements.
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
    bool is_causal;  // the last query sees all keys, the one before it one less, and so on; else all see all
    const int64_t* branches;
    int64_t num_branches;
    int64_t num_parts, part_keys;  // 0 without keys or branches
    int64_t first_result;          // of its (num_parts, num_kv_heads, rows)
};

struct Part {
    const Segment* segment;
    int64_t number, first_key, last_key;
};

// The segments that a branch reads, and where it stands among the branches of its root.
struct Sources {
    const Segment *root, *own;
    int64_t place_in_root;
};

struct DecodeProblem {
    int64_t num_branches, num_roots, num_queries, num_heads, num_kv_heads, head_dim;  // num_queries: of a branch
    int64_t root_room, branch_room;                                                   // keys an entry has room for
    float scale;
    bool is_bfloat16;  // else fp32
    Cache q;           // (branches, queries, heads, head_dim)
    Cache root_k, root_v, branch_k, branch_v;
    Index branch_to_root, root_lengths, branch_lengths;
    void* out;   // (branches, queries, heads, head_dim), contiguous
    float* lse;  // (branches, queries, heads)
    // Filled in by decode(): of each branch what it reads, and the results of all parts.
    const Sources* sources;
    float *sums, *totals, *maxima;  // (results, sum_stride), (results,), (results,): softmax(s) v is sum / total
    int64_t sum_stride;

    int64_t rows_of_branch() const { return num_queries * (num_heads / num_kv_heads); }
};

// One instruction set's kernels. `scratch_bytes` is what a segment's parts need at `scratch`, 64-byte aligned.
struct DecodeKernels {
    size_t (*scratch_bytes)(const DecodeProblem&, const Segment&);
    void (*attend)(const DecodeProblem&, const Part&, int64_t first_kv_head, int64_t last_kv_head, void* scratch);
    void (*merge)(const DecodeProblem&, int64_t branch);
};

constexpr int64_t kDecodeTile = 32;  // keys, at most; parts are multiples of it
constexpr int64_t kMostParts = 16;   // of a segment

}  // namespace lynx
