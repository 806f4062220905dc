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

    Scratch(Workspace workspace, int64_t kv_heads, int64_t rows, const Sizes<Compute>& sizes,
            const Sizes<Compute>& value_sizes)
        : TileScratch<Compute>(workspace, kBlockM, kBlockN, sizes, value_sizes) {
        queries = workspace.take<Word>(kv_heads * rows * sizes.lda);
        row_sum = workspace.take<float>(kv_heads * rows * kWidth);
        bytes = workspace.bytes();
    }
};

inline int64_t rows_of(const Problem& problem, const Segment& segment) {
    return segment.num_readers * problem.rows_of_branch();
}

// The keys and values of a tile, of one key head.
template <class Element>
struct Tile {
    Rows<Element> k, v;

    LYNX_INLINE Tile(const Problem& problem, const Split& split, int64_t key, int64_t head) {
        const int64_t keys = min(kBlockN, split.last_key - key);
        const Segment& from = *split.segment;
        k = {head_of<Element>(from.k, key, head), from.k.row_stride, keys, problem.head_dim};
        v = {head_of<Element>(from.v, key, head), from.v.row_stride, keys, problem.value_dim};
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
    for (int64_t i = 0; i < segment.num_readers; i++) {
        const int64_t branch = segment.readers[i].branch * problem.q.stride;
        for (int64_t query = 0; query < problem.num_queries; query++) {
            const Element* first = head_of<Element>(q, query, kv_head * group_heads) + branch;
            pack_a<Compute>(Rows<Element>{first, q.head_stride, group_heads, problem.head_dim}, to, lda);
            to += group_heads * lda;
        }
    }
}

// How many of the segment's keys lie before the window or chunk of a row's query.
inline int64_t unseen_by(const Problem& problem, const Segment& segment, int64_t row) {
    const int64_t rows = problem.rows_of_branch(), group_heads = problem.num_heads / problem.num_kv_heads;
    const Reader& reader = segment.readers[row / rows];
    return problem.floor(reader.branch, row % rows / group_heads) - reader.offset;
}

// Rows of a segment from `row` on, and keys of it from `first_key` on. The results of row 0 stand at `result`.
struct Block {
    int64_t row, rows, first_key, keys, result;
};

// The online softmax of a block's scores: their weights, which replace them, and the sums so far.
template <class Compute, bool kLocal>
void softmax_rows(const Problem& problem, const Segment& segment, const Block& block, const Scratch<Compute>& scratch,
           float scale) {
    const int64_t group_heads = problem.num_heads / problem.num_kv_heads, ldp = kBlockN / Compute::kNumbers;
    for (int64_t i = 0; i < block.rows; i++) {
        const int64_t row = block.row + i;
        // The older queries of a branch do not see its newest keys.
        const int64_t newer = segment.is_causal ? problem.num_queries - 1 - row / group_heads : 0;
        const int64_t most = segment.num_keys - newer - block.first_key, seen = most < 0 ? 0 : min(most, block.keys);
        const int64_t unseen = kLocal ? unseen_by(problem, segment, row) - block.first_key : 0;
        const bool sees_none = kLocal && unseen >= seen;
        online_softmax<Compute, kLocal>(scratch.scores + i * kBlockN, scratch.p + i * ldp,
                                        sees_none || unseen < 0 ? 0 : unseen, sees_none ? 0 : seen, block.keys, scale,
                                        problem.row_max[block.result + row], scratch.row_sum + row * kWidth,
                                        problem.acc + (block.result + row) * problem.acc_stride, problem.value_dim);
    }
}

// Adds one tile to a head's results, which stand from `result` on. `scratch` has the head's queries and row_sum.
template <class Compute, class Element>
void attend_to_tile(const Problem& problem, const Segment& segment, int64_t first_key, const Tile<Element>& tile,
                    const Tile<Element>& next, const Scratch<Compute>& scratch, const Sizes<Compute>& sizes,
                    const Sizes<Compute>& value_sizes, int64_t result) {
    typedef typename Compute::Word Word;
    const int64_t dim = problem.value_dim, keys = tile.k.count, rows = rows_of(problem, segment);
    const int64_t ldp = kBlockN / Compute::kNumbers;
    for (int64_t key = 0; key < keys; key += kPrefetchRows) {
        prefetch(next.k.slice(key, kPrefetchRows));
        pack_b_transposed<Compute>(tile.k.slice(key, kPrefetchRows), scratch.keys + key, kBlockN);
    }
    const Word* values = scratch.values;
    int64_t ldv = value_sizes.ldb;
    // A single register tile of rows reads fp32 values only once. It reads them where they stand, if they are whole
    // vectors.
    if (sizeof(Element) == sizeof(Word) && Compute::kNumbers == 1 && dim % kWidth == 0 && rows <= kTileRows) {
        values = reinterpret_cast<const Word*>(tile.v.first);
        ldv = tile.v.stride;
    } else {
        pack_b<Compute>(tile.v, scratch.values, value_sizes.ldb);
    }
    for (int64_t row = 0; row < rows; row += kBlockM) {
        const int64_t m = min(kBlockM, rows - row);
        float* acc = problem.acc + (result + row) * problem.acc_stride;
        matmul<Compute, false>(m, keys,
                               {scratch.queries + row * sizes.lda, sizes.lda, scratch.keys, kBlockN, scratch.scores,
                                kBlockN, sizes.words, false});
        float scale = problem.scale;
        if (problem.softcap > 0) {
            cap_scores(scratch.scores, m, kBlockN, keys, scale, problem.softcap);
            scale = 1;
        }
        const Block block = {row, m, first_key, keys, result};
        if (problem.is_local())
            softmax_rows<Compute, true>(problem, segment, block, scratch, scale);
        else
            softmax_rows<Compute, false>(problem, segment, block, scratch, scale);
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
    const Sizes<Compute> sizes(problem.head_dim), value_sizes(problem.value_dim);
    const Scratch<Compute> scratch(Workspace(block), heads, rows, sizes, value_sizes);
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
            attend_to_tile(problem, segment, key, tile, next, of_head, sizes, value_sizes, first_result + head * rows);
        }
    for (int64_t i = 0; i < results; i++)
        problem.row_sum[first_result + i] = sum_of_lanes(load(scratch.row_sum + i * kWidth));
}

// The indices of a row's partial results, over the splits of all segments that it reads.
struct Results {
    int64_t* indices;
    float* factors;  // of each result
    int64_t count;
    size_t bytes;

    Results(Workspace workspace, const Problem& problem) : count(0) {
        const int64_t most = (problem.num_ranges + 1) * kMaxSplits;
        indices = workspace.take<int64_t>(most);
        factors = workspace.take<float>(most);
        bytes = workspace.bytes();
    }

    LYNX_INLINE void add(const Problem& problem, const Part& part, int64_t kv_head, int64_t row) {
        const Segment& segment = *part.segment;
        const int64_t rows = rows_of(problem, segment), place = part.reader * problem.rows_of_branch() + row;
        for (int64_t split = 0; split < segment.num_splits; split++)
            indices[count++] = segment.first_result + (split * problem.num_kv_heads + kv_head) * rows + place;
    }
};

// Rescales acc and row_sum of all partial results to the largest row_max. The quotient of their sums is the output. A
// sink is one more score, without a value.
template <class Element>
void combine_row(const Problem& problem, const Results& results, const float* sink, Element* out, float* lse) {
    float row_max = sink != nullptr ? *sink : -__builtin_inff();
    for (int64_t i = 0; i < results.count; i++) {
        const float other = problem.row_max[results.indices[i]];
        row_max = other > row_max ? other : row_max;
    }
    float row_sum = sink != nullptr ? exp(broadcast(*sink - row_max))[0] : 0;
    for (int64_t i = 0; i < results.count; i++) {
        results.factors[i] = exp(broadcast(problem.row_max[results.indices[i]] - row_max))[0];
        row_sum += results.factors[i] * problem.row_sum[results.indices[i]];
    }
    for (int64_t column = 0; column < problem.value_dim; column += kWidth) {
        Floats sum = {};
        for (int64_t i = 0; i < results.count; i++)
            sum += results.factors[i] * load(problem.acc + results.indices[i] * problem.acc_stride + column);
        store_first(out + column, sum / row_sum, problem.value_dim - column);
    }
    *lse = row_sum == row_sum ? row_max + log(broadcast(row_sum))[0] : row_sum;
}

template <class Element>
void combine_branch(const Problem& problem, int64_t branch, Results results) {
    const int64_t group_heads = problem.num_heads / problem.num_kv_heads;
    const Part* parts = problem.parts + branch * (problem.num_ranges + 1);
    for (int64_t query = 0; query < problem.num_queries; query++)
        for (int64_t head = 0; head < problem.num_heads; head++) {
            const int64_t row = query * group_heads + head % group_heads, kv_head = head / group_heads;
            const int64_t index = (branch * problem.num_queries + query) * problem.num_heads + head;
            results.count = 0;
            for (int64_t i = 0; i <= problem.num_ranges; i++) results.add(problem, parts[i], kv_head, row);
            combine_row(problem, results, problem.sinks == nullptr ? nullptr : problem.sinks + head,
                        static_cast<Element*>(problem.out) + index * problem.value_dim, problem.lse + index);
        }
}

template <class Compute>
size_t scratch_bytes_of(const Problem& problem, const Segment& segment) {
    return Scratch<Compute>(Workspace(nullptr), problem.num_kv_heads, rows_of(problem, segment),
                            Sizes<Compute>(problem.head_dim), Sizes<Compute>(problem.value_dim)).bytes;
}

size_t scratch_bytes(const Problem& problem, const Segment& segment) {
    return problem.is_bfloat16 ? scratch_bytes_of<Bf16>(problem, segment) : scratch_bytes_of<Fp32>(problem, segment);
}

void attend(const Problem& problem, const Split& split, int64_t first_kv_head, int64_t last_kv_head, void* scratch) {
    if (problem.is_bfloat16)
        attend_to_split<Bf16, BFloat16>(problem, split, first_kv_head, last_kv_head, scratch);
    else
        attend_to_split<Fp32, float>(problem, split, first_kv_head, last_kv_head, scratch);
}

size_t combine_scratch_bytes(const Problem& problem) { return Results(Workspace(nullptr), problem).bytes; }

void combine(const Problem& problem, int64_t branch, void* scratch) {
    const Results results(Workspace(scratch), problem);
    if (problem.is_bfloat16)
        combine_branch<BFloat16>(problem, branch, results);
    else
        combine_branch<float>(problem, branch, results);
}

}  // namespace

namespace lynx::decode {

extern const Kernels LYNX_KERNELS = {scratch_bytes, attend, combine_scratch_bytes, combine};

}  // namespace lynx::decode
