// What a call of prefix_attention_decode is, for the kernels and their caller. Plain data, pointers and sizes.
//
// Keys that stand together are a segment: a range of shared keys, or a branch's own. A segment is cut into splits. For
// every split, key head and row there is a partial result, and combining a row's partial results gives its output. The
// rows of a segment are numbered reader after reader, query after query, head after head of those that share the key
// head.
#pragma once

#include "attention_common/cpu/problem.h"

namespace lynx::decode {

using attention::Matrix;

// (entries, rows, heads, head_dim). The head dimension is contiguous; strides are in elements.
struct Cache {
    Matrix first;  // entry
    int64_t stride;
};

// int32 or int64, contiguous.
struct Index {
    const void* data;
    bool is_int64;

    int64_t operator[](int64_t i) const {
        return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
};

// A branch that reads a segment, and the place of the segment's first key along the branch's path.
struct Reader {
    int64_t branch, offset;
};

struct Segment {
    Matrix k, v;
    int64_t num_keys;
    bool is_causal;  // the last query sees all keys, the one before it one less, and so on; else every query sees all
    const Reader* readers;
    int64_t num_readers;
    int64_t num_splits, split_keys;  // 0 without keys
    int64_t first_result;            // the index of the first of its (num_splits, num_kv_heads, rows) results
};

struct Split {
    const Segment* segment;
    int64_t index, first_key, last_key;
};

// A segment that a branch reads, and its place among the segment's readers.
struct Part {
    const Segment* segment;
    int64_t reader;
};

struct Problem {
    int64_t num_branches, num_queries, num_ranges;  // queries and ranges: of a branch
    int64_t num_heads, num_kv_heads, head_dim, value_dim;
    int64_t num_shared, branch_capacity;  // keys: shared ones, and those that a branch has room for
    int64_t window, chunk;                // 0: none
    float scale;
    float softcap;       // 0: none
    const float* sinks;  // (heads,), or null
    bool is_bfloat16;    // else fp32
    Cache q;             // (branches, queries, heads, head_dim)
    Matrix shared_k, shared_v;
    Cache branch_k, branch_v;
    Index ranges;          // (branches, num_ranges, 2): first key and end
    Index branch_lengths;  // (branches,)
    void* out;             // (branches, queries, heads, value_dim), contiguous
    float* lse;            // (branches, queries, heads)
    // forward() fills in what follows: what each branch reads, and the partial results. softmax(s) v is acc / row_sum.
    const Part* parts;            // (branches, num_ranges + 1), the branch's own keys last
    const int64_t* path_lengths;  // (branches,)
    float* acc;                   // (results, acc_stride)
    float* row_sum;               // (results,)
    float* row_max;               // (results,)
    int64_t acc_stride;

    int64_t rows_of_branch() const { return num_queries * (num_heads / num_kv_heads); }

    bool is_local() const { return window > 0 || chunk > 0; }

    // The first place along its path that a query of a branch sees; never falls from one query to the next.
    int64_t floor(int64_t branch, int64_t query) const {
        const int64_t place = path_lengths[branch] - num_queries + query;
        return window > 0 ? place - window + 1 : chunk > 0 ? place / chunk * chunk : 0;
    }
};

// The kernels of one instruction set. A segment's splits need `scratch_bytes` bytes at `scratch`, 64-byte aligned, and
// the combination of a branch needs `combine_scratch_bytes`.
struct Kernels {
    size_t (*scratch_bytes)(const Problem&, const Segment&);
    void (*attend)(const Problem&, const Split&, int64_t first_kv_head, int64_t last_kv_head, void* scratch);
    size_t (*combine_scratch_bytes)(const Problem&);
    void (*combine)(const Problem&, int64_t branch, void* scratch);
};

constexpr int64_t kBlockN = 32;     // keys of a tile, at most; a split is a multiple of it
constexpr int64_t kMaxSplits = 16;  // of a segment

}  // namespace lynx::decode
