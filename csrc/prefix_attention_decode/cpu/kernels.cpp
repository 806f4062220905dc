// The kernels of decoding of one instruction set. This file is compiled once for each, and LYNX_KERNELS names the
// result.
//
// Few rows read many keys, so the time is that of reading every key and value from memory once. Keys are read where
// they stand, and transposed one tile at a time. A tile is short, and done for one head after another: where heads
// stand side by side, this reads memory in its order and from few pages at a time. While a head is computed, the keys
// and values of the next one are prefetched.
#include "attention_common/cpu/online_softmax.h"
#include "attention_common/cpu/scratch.h"
#include "problem.h"

namespace {

using namespace lynx::decode;

constexpr int64_t kBlockM = 48;        // rows: 8 register tiles
constexpr int64_t kPrefetchRows = 16;  // rows of a cache that are prefetched at once, a multiple of every kWidth

template <class Compute>
struct Scratch : TileScratch<Compute> {
    typedef typename Compute::Word Word;
    Word* queries;   // (kv heads, rows, lda)
    float* row_sum;  // (kv heads, rows, kWidth), its lanes not yet added
    size_t bytes;

    Scratch(Workspace workspace, int64_t kv_heads, int64_t rows, const Sizes<Compute>& sizes)
        : TileScratch<Compute>(workspace, kBlockM, kBlockN, sizes, sizes) {
        queries = workspace.take<Word>(kv_heads * rows * sizes.lda);
        row_sum = workspace.take<float>(kv_heads * rows * kWidth);
        bytes = workspace.bytes();
    }
};

inline int64_t rows_of(const Problem& problem, const Segment& segment) {
    return segment.num_branches * problem.rows_of_branch();
}

// The keys and values of a tile, of one key head.
template <class Element>
struct Tile {
    Rows<Element> k, v;

    LYNX_INLINE Tile(const Problem& problem, const Split& split, int64_t key, int64_t head) {
        const int64_t keys = min(kBlockN, split.last_key - key);
        const Segment& from = *split.segment;
        k = {head_of<Element>(from.k, key, head), from.k.row_stride, keys, problem.head_dim};
        v = {head_of<Element>(from.v, key, head), from.v.row_stride, keys, problem.head_dim};
    }
};

template <class Element>
LYNX_INLINE void prefetch(const Rows<Element>& rows) {
    const int64_t row_bytes = rows.dim * static_cast<int64_t>(sizeof(Element));
    for (int64_t row = 0; row < rows.count; row++)
        for (int64_t byte = 0; byte < row_bytes; byte += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(rows.first + row * rows.stride) + byte, 0, 2);
}

// The queries of all rows, as operand a.
template <class Compute, class Element>
void pack_queries(const Problem& problem, const Segment& segment, int64_t kv_head, int64_t lda,
                  typename Compute::Word* to) {
    const int64_t group_heads = problem.num_heads / problem.num_kv_heads;
    const Matrix& q = problem.q.first;
    for (int64_t i = 0; i < segment.num_branches; i++) {
        const int64_t branch = segment.branches[i] * problem.q.stride;
        for (int64_t query = 0; query < problem.num_queries; query++) {
            const Element* first = head_of<Element>(q, query, kv_head * group_heads) + branch;
            pack_a<Compute>(Rows<Element>{first, q.head_stride, group_heads, problem.head_dim}, to, lda);
            to += group_heads * lda;
        }
    }
}

// Adds one tile to a head's results, which stand from `result` on. `scratch` has the head's queries and row_sum.
template <class Compute, class Element>
void attend_to_tile(const Problem& problem, const Segment& segment, int64_t first_key, const Tile<Element>& tile,
                    const Tile<Element>& next, const Scratch<Compute>& scratch, const Sizes<Compute>& sizes,
                    int64_t result) {
    typedef typename Compute::Word Word;
    const int64_t dim = problem.head_dim, keys = tile.k.count, rows = rows_of(problem, segment);
    const int64_t group_heads = problem.num_heads / problem.num_kv_heads;
    const int64_t ldp = kBlockN / Compute::kNumbers;
    for (int64_t key = 0; key < keys; key += kPrefetchRows) {
        prefetch(next.k.slice(key, kPrefetchRows));
        pack_b_transposed<Compute>(tile.k.slice(key, kPrefetchRows), scratch.keys + key, kBlockN);
    }
    const Word* values = scratch.values;
    int64_t ldv = sizes.ldb;
    // A single register tile of rows reads fp32 values only once. It reads them where they stand, if they are whole
    // vectors.
    if (sizeof(Element) == sizeof(Word) && Compute::kNumbers == 1 && dim % kWidth == 0 && rows <= kTileRows) {
        values = reinterpret_cast<const Word*>(tile.v.first);
        ldv = tile.v.stride;
    } else {
        pack_b<Compute>(tile.v, scratch.values, sizes.ldb);
    }
    for (int64_t row = 0; row < rows; row += kBlockM) {
        const int64_t m = min(kBlockM, rows - row);
        float* acc = problem.acc + (result + row) * problem.acc_stride;
        matmul<Compute, false>(m, keys,
                               {scratch.queries + row * sizes.lda, sizes.lda, scratch.keys, kBlockN, scratch.scores,
                                kBlockN, sizes.words, false});
        for (int64_t i = 0; i < m; i++) {
            // The older queries of a branch do not see its newest keys.
            const int64_t newer = segment.is_causal ? problem.num_queries - 1 - (row + i) / group_heads : 0;
            const int64_t seen = segment.num_keys - newer - first_key;
            online_softmax<Compute, false>(scratch.scores + i * kBlockN, scratch.p + i * ldp, 0, seen < 0 ? 0 : min(seen, keys),
                                    keys, problem.scale, problem.row_max[result + row + i],
                                    scratch.row_sum + (row + i) * kWidth, acc + i * problem.acc_stride, dim);
        }
        for (int64_t key = 0; key < keys; key += kPrefetchRows) {
            if (row == 0) prefetch(next.v.slice(key, kPrefetchRows));
            matmul<Compute, false>(m, dim,
                                   Product<Word>{scratch.p + key / Compute::kNumbers, ldp,
                                                 values + key / Compute::kNumbers * ldv, ldv, acc, problem.acc_stride,
                                                 sizes.k_over(min(kPrefetchRows, keys - key)), true});
        }
    }
}

template <class Compute, class Element>
void attend_to_split(const Problem& problem, const Split& split, int64_t first_kv_head, int64_t last_kv_head,
                     void* block) {
    const Segment& segment = *split.segment;
    const int64_t rows = rows_of(problem, segment), heads = last_kv_head - first_kv_head;
    const Sizes<Compute> sizes(problem.head_dim);
    const Scratch<Compute> scratch(Workspace(block), heads, rows, sizes);
    const int64_t first_result = segment.first_result + (split.index * problem.num_kv_heads + first_kv_head) * rows;
    const int64_t results = heads * rows;
    memset(problem.acc + first_result * problem.acc_stride, 0, results * problem.acc_stride * sizeof(float));
    memset(scratch.row_sum, 0, results * kWidth * sizeof(float));
    for (int64_t i = 0; i < results; i++) problem.row_max[first_result + i] = -__builtin_inff();
    for (int64_t head = 0; head < heads; head++)
        pack_queries<Compute, Element>(problem, segment, first_kv_head + head, sizes.lda,
                                       scratch.queries + head * rows * sizes.lda);
    for (int64_t key = split.first_key; key < split.last_key; key += kBlockN)
        for (int64_t head = 0; head < heads; head++) {
            const bool is_last = head + 1 == heads;
            const int64_t next_key = min(is_last ? key + kBlockN : key, split.last_key);
            const Tile<Element> tile(problem, split, key, first_kv_head + head);
            const Tile<Element> next(problem, split, next_key, is_last ? first_kv_head : first_kv_head + head + 1);
            Scratch<Compute> of_head = scratch;
            of_head.queries += head * rows * sizes.lda;
            of_head.row_sum += head * rows * kWidth;
            attend_to_tile(problem, segment, key, tile, next, of_head, sizes, first_result + head * rows);
        }
    for (int64_t i = 0; i < results; i++)
        problem.row_sum[first_result + i] = sum_of_lanes(load(scratch.row_sum + i * kWidth));
}

// The indices of a row's partial results, over the splits of both segments that it reads.
struct Results {
    int64_t indices[2 * kMaxSplits];
    int64_t count;

    LYNX_INLINE void add(const Problem& problem, const Segment& segment, int64_t kv_head, int64_t row) {
        const int64_t rows = rows_of(problem, segment);
        for (int64_t split = 0; split < segment.num_splits; split++)
            indices[count++] = segment.first_result + (split * problem.num_kv_heads + kv_head) * rows + row;
    }
};

// Rescales acc and row_sum of all partial results to the largest row_max. The quotient of their sums is the output.
template <class Element>
void combine_row(const Problem& problem, const Results& results, Element* out, float* lse) {
    float row_max = -__builtin_inff(), row_sum = 0, factors[2 * kMaxSplits];
    for (int64_t i = 0; i < results.count; i++) {
        const float other = problem.row_max[results.indices[i]];
        row_max = other > row_max ? other : row_max;
    }
    for (int64_t i = 0; i < results.count; i++) {
        factors[i] = exp(broadcast(problem.row_max[results.indices[i]] - row_max))[0];
        row_sum += factors[i] * problem.row_sum[results.indices[i]];
    }
    for (int64_t column = 0; column < problem.head_dim; column += kWidth) {
        Floats sum = {};
        for (int64_t i = 0; i < results.count; i++)
            sum += factors[i] * load(problem.acc + results.indices[i] * problem.acc_stride + column);
        store_first(out + column, sum / row_sum, problem.head_dim - column);
    }
    *lse = row_sum == row_sum ? row_max + log(broadcast(row_sum))[0] : row_sum;
}

template <class Element>
void combine_branch(const Problem& problem, int64_t branch) {
    const Sources& sources = problem.sources[branch];
    const int64_t group_heads = problem.num_heads / problem.num_kv_heads, rows = problem.rows_of_branch();
    for (int64_t query = 0; query < problem.num_queries; query++)
        for (int64_t head = 0; head < problem.num_heads; head++) {
            const int64_t row = query * group_heads + head % group_heads, kv_head = head / group_heads;
            const int64_t index = (branch * problem.num_queries + query) * problem.num_heads + head;
            Results results = {};
            results.add(problem, *sources.root, kv_head, sources.place_in_root * rows + row);
            results.add(problem, *sources.own, kv_head, row);
            combine_row(problem, results, static_cast<Element*>(problem.out) + index * problem.head_dim,
                        problem.lse + index);
        }
}

size_t scratch_bytes(const Problem& problem, const Segment& segment) {
    const int64_t rows = rows_of(problem, segment), dim = problem.head_dim;
    const int64_t heads = problem.num_kv_heads;
    const Workspace empty(nullptr);
    return problem.is_bfloat16 ? Scratch<Bf16>(empty, heads, rows, Sizes<Bf16>(dim)).bytes
                               : Scratch<Fp32>(empty, heads, rows, Sizes<Fp32>(dim)).bytes;
}

void attend(const Problem& problem, const Split& split, int64_t first_kv_head, int64_t last_kv_head, void* scratch) {
    if (problem.is_bfloat16)
        attend_to_split<Bf16, BFloat16>(problem, split, first_kv_head, last_kv_head, scratch);
    else
        attend_to_split<Fp32, float>(problem, split, first_kv_head, last_kv_head, scratch);
}

void combine(const Problem& problem, int64_t branch) {
    if (problem.is_bfloat16)
        combine_branch<BFloat16>(problem, branch);
    else
        combine_branch<float>(problem, branch);
}

}  // namespace

namespace lynx::decode {

extern const Kernels LYNX_KERNELS = {scratch_bytes, attend, combine};

}  // namespace lynx::decode
