// Forward: out = softmax(scale q k^T) v and its LSE, the log of the softmax's denominator, one key tile after another.
#pragma once

#include "online_softmax.h"
#include "problem.h"
#include "scratch.h"
#include "visibility.h"

namespace {

using namespace lynx::attention;

constexpr int64_t kForwardBlockM = 48;        // queries: 8 register tiles
constexpr int64_t kForwardMaskedBlockM = 12;  // in masked tiles: keys that none of so few queries sees are skipped

template <class Compute>
struct ForwardScratch : TileScratch<Compute> {
    typedef typename Compute::Word Word;
    Word* queries;   // (rows, lda)
    float* acc;      // (rows, ldb): the output before it is divided by row_sum
    float* row_sum;  // (rows + kWidth, kWidth), its lanes not yet added
    float* row_max;  // (rows + kWidth,)
    size_t bytes;

    ForwardScratch(Workspace workspace, int64_t rows, const Sizes<Compute>& sizes)
        : TileScratch<Compute>(workspace, kForwardBlockM, kForwardBlockN, sizes) {
        queries = workspace.take<Word>(rows * sizes.lda);
        acc = workspace.take<float>(rows * sizes.ldb);
        row_sum = workspace.take<float>((rows + kWidth) * kWidth);
        row_max = workspace.take<float>(rows + kWidth);
        bytes = workspace.bytes();
    }
};

inline int64_t queries_of(const Problem& problem, const Task& task) {
    int64_t queries = 0;
    for (int64_t i = task.first_run; i < task.last_run; i++)
        queries += problem.runs[i].last_query - problem.runs[i].first_query;
    return queries;
}

// Prefetches what the task reads of the next key head, in steps, while this head is computed. Without it short samples
// wait for memory for a quarter of their time.
template <class Element>
class NextHead {
   public:
    NextHead(const Problem& problem, const Task& task, int64_t kv_head, int64_t queries) {
        const int64_t group_heads = problem.num_heads / problem.num_kv_heads;
        const int64_t first_query = problem.runs[task.first_run].first_query;
        const int64_t first_key = task.first_tile < task.last_tile ? problem.tiles[task.first_tile].begin : 0;
        const int64_t keys = task.first_tile < task.last_tile ? problem.tiles[task.last_tile - 1].end - first_key : 0;
        const int64_t row_bytes = problem.head_dim * sizeof(Element);
        const bool is_contiguous = problem.runs[task.last_run - 1].last_query - first_query == queries;
        if (kv_head + 1 == problem.num_kv_heads || !is_contiguous ||
            (queries * group_heads + 2 * keys) * row_bytes > kMaxBytes)
            return;
        blocks_[0] = block(problem.q, first_query, (kv_head + 1) * group_heads, queries, group_heads * row_bytes);
        blocks_[1] = block(problem.k, first_key, kv_head + 1, keys, row_bytes);
        blocks_[2] = block(problem.v, first_key, kv_head + 1, keys, row_bytes);
        queries_ = queries;
    }

    // Prefetches the share of so many queries. Once all queries are counted, further calls do nothing.
    void prefetch(int64_t queries) {
        if (done_ >= queries_) return;
        for (const Block& block : blocks_) {
            const int64_t last = min(done_ + queries, queries_) * block.rows / queries_;
            for (int64_t row = done_ * block.rows / queries_; row < last; row++)
                for (int64_t byte = 0; byte < block.row_bytes; byte += 64)
                    __builtin_prefetch(block.first + row * block.stride + byte, 0, 2);
        }
        done_ += queries;
    }

   private:
    static constexpr int64_t kMaxBytes = 1 << 18;  // a part of the cache that this head does not need

    struct Block {
        const char* first;
        int64_t rows, stride, row_bytes;
    };

    static Block block(const Matrix& matrix, int64_t row, int64_t head, int64_t rows, int64_t row_bytes) {
        return {reinterpret_cast<const char*>(head_of<Element>(matrix, row, head)), rows,
                matrix.row_stride * static_cast<int64_t>(sizeof(Element)), row_bytes};
    }

    Block blocks_[3] = {};
    int64_t queries_ = 0, done_ = 0;
};

// Adds one tile to a run's queries, for one query head. `row_of_run` is the scratch row of the run's first query.
template <class Compute, class Element>
void forward_tile(const ForwardScratch<Compute>& scratch, const Sizes<Compute>& sizes, const Run& run, const View& view,
                  int64_t row_of_run, float scale, int64_t dim, NextHead<Element>& next_head) {
    typedef typename Compute::Word Word;
    const int64_t ldp = kForwardBlockN / Compute::kNumbers;
    for (int64_t query = view.first_query; query < run.last_query;) {
        const int64_t block_m = view.is_unmasked_from(query) ? kForwardBlockM : kForwardMaskedBlockM;
        const int64_t m = min(block_m, run.last_query - query);
        const int64_t row = row_of_run + query - run.first_query;
        const int64_t n = view.keys_seen(query + m - 1);
        float* acc = scratch.acc + row * sizes.ldb;
        matmul<Compute, false>(m, n,
                               {scratch.queries + row * sizes.lda, sizes.lda, scratch.keys, kForwardBlockN,
                                scratch.scores, kForwardBlockN, sizes.words, false});
        next_head.prefetch(m);
        for (int64_t i = 0; i < m; i++)
            online_softmax<Compute>(scratch.scores + i * kForwardBlockN, scratch.p + i * ldp,
                                    view.keys_seen(query + i), n, scale, scratch.row_max[row + i],
                                    scratch.row_sum + (row + i) * kWidth, acc + i * sizes.ldb, dim);
        matmul<Compute, false>(m, dim,
                               Product<Word>{scratch.p, ldp, scratch.values, sizes.ldb, acc, sizes.ldb,
                                             sizes.k_over(n), true});
        query += m;
    }
}

// Writes the output and the LSE of a run's queries, for one query head.
template <class Compute, class Element>
void write_output(const Problem& problem, const ForwardScratch<Compute>& scratch, const Sizes<Compute>& sizes,
                  const Run& run, int64_t first_row, int64_t head) {
    const int64_t rows = run.last_query - run.first_query, dim = problem.head_dim;
    for (int64_t begin = 0; begin < rows; begin += kWidth) {
        const Floats denominator = sums_of_rows(scratch.row_sum + (first_row + begin) * kWidth);
        const Floats divisors = denominator == 0.0f ? broadcast(1.0f) : denominator;  // 0: no key is seen, acc is 0
        const Floats lse = load(scratch.row_max + first_row + begin) + log(denominator);
        const Floats nothing_seen = broadcast(-__builtin_inff());
        const Floats values = denominator == denominator ? (denominator == 0.0f ? nothing_seen : lse) : denominator;
        for (int64_t i = 0; i < min(kWidth, rows - begin); i++) {
            const int64_t query = run.first_query + begin + i;
            const float* acc = scratch.acc + (first_row + begin + i) * sizes.ldb;
            Element* out = head_of<Element>(problem.out, query, head);
            for (int64_t column = 0; column < dim; column += kWidth)
                store_first(out + column, load(acc + column) / divisors[i], dim - column);
            problem.lse[query * problem.num_heads + head] = values[i];
        }
    }
}

template <class Compute, class Element>
void forward_task(const Problem& problem, const Task& task, int64_t kv_head, void* block) {
    const int64_t dim = problem.head_dim, group_heads = problem.num_heads / problem.num_kv_heads;
    const int64_t queries = queries_of(problem, task), rows = queries * group_heads;
    const int64_t first_head = kv_head * group_heads;
    const Sizes<Compute> sizes(dim);
    const ForwardScratch<Compute> scratch(Workspace(block), rows, sizes);
    const float scale = problem.scale;
    NextHead<Element> next_head(problem, task, kv_head, queries);
    memset(scratch.acc, 0, rows * sizes.ldb * sizeof(float));
    memset(scratch.row_sum, 0, rows * kWidth * sizeof(float));
    for (int64_t row = 0; row < rows; row++) scratch.row_max[row] = -__builtin_inff();

    // Rows of the scratch: all queries of the task for the first query head, then for the next one, and so on.
    for (int64_t head = 0; head < group_heads; head++) {
        int64_t row = head * queries;
        for (int64_t i = task.first_run; i < task.last_run; i++) {
            const Run& run = problem.runs[i];
            const Rows<Element> q = {head_of<Element>(problem.q, run.first_query, first_head + head),
                                     problem.q.row_stride, run.last_query - run.first_query, dim};
            pack_a<Compute>(q, scratch.queries + row * sizes.lda, sizes.lda);
            row += q.count;
        }
    }
    for (int64_t t = task.first_tile; t < task.last_tile; t++) {
        const Tile& tile = problem.tiles[t];
        bool is_packed = false;
        int64_t row = 0;
        for (int64_t i = task.first_run; i < task.last_run; i++) {
            const Run& run = problem.runs[i];
            const View view = view_of(run, tile);
            if (view.first_query < run.last_query && !is_packed) {
                pack_b_transposed<Compute>(rows_of_tile<Element>(problem.k, tile, kv_head, dim), scratch.keys,
                                           kForwardBlockN);
                pack_b<Compute>(rows_of_tile<Element>(problem.v, tile, kv_head, dim), scratch.values, sizes.ldb);
                is_packed = true;
            }
            for (int64_t head = 0; head < group_heads; head++)
                forward_tile(scratch, sizes, run, view, head * queries + row, scale, dim, next_head);
            row += run.last_query - run.first_query;
        }
    }
    for (int64_t head = 0; head < group_heads; head++) {
        int64_t row = head * queries;
        for (int64_t i = task.first_run; i < task.last_run; i++) {
            write_output<Compute, Element>(problem, scratch, sizes, problem.runs[i], row, first_head + head);
            row += problem.runs[i].last_query - problem.runs[i].first_query;
        }
    }
}

template <class Compute>
size_t forward_scratch_bytes(const Problem& problem, const Task& task) {
    const int64_t rows = queries_of(problem, task) * (problem.num_heads / problem.num_kv_heads);
    return ForwardScratch<Compute>(Workspace(nullptr), rows, Sizes<Compute>(problem.head_dim)).bytes;
}

}  // namespace
