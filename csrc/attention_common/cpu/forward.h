// Forward: out = softmax(scale q k^T) v and its LSE, the log of the softmax's denominator, one key tile after another.
// A soft cap c makes the scores c tanh(scale / c q k^T). A sink is a score without a value, added at the end.
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
    float* acc;      // (rows, ldb of values): the output before it is divided by row_sum
    float* row_sum;  // (rows + kWidth, kWidth), its lanes not yet added
    float* row_max;  // (rows + kWidth,)
    size_t bytes;

    ForwardScratch(Workspace workspace, int64_t rows, const Sizes<Compute>& sizes, const Sizes<Compute>& value_sizes)
        : TileScratch<Compute>(workspace, kForwardBlockM, kForwardBlockN, sizes, value_sizes) {
        queries = workspace.take<Word>(rows * sizes.lda);
        acc = workspace.take<float>(rows * value_sizes.ldb);
        row_sum = workspace.take<float>((rows + kWidth) * kWidth);
        row_max = workspace.take<float>(rows + kWidth);
        bytes = workspace.bytes();
    }
};

// The rows of the scratch that a task's runs take, for one query head.
inline int64_t rows_of(const Problem& problem, const Task& task) {
    const Run& last = problem.runs[task.last_run - 1];
    return last.row - problem.runs[task.first_run].row + round_up(last.last_query - last.first_query, 2);
}

// Prefetches what the task reads of the next key head, in steps, while this head is computed. Without it short samples
// wait for memory for a quarter of their time.
template <class Element>
class NextHead {
   public:
    NextHead(const Problem& problem, const Task& task, int64_t kv_head) {
        const int64_t group_heads = problem.num_heads / problem.num_kv_heads;
        const int64_t first_query = problem.runs[task.first_run].first_query;
        const int64_t first_key = task.first_tile < task.last_tile ? problem.tiles[task.first_tile].begin : 0;
        int64_t queries = 0, keys = 0;
        for (int64_t i = task.first_run; i < task.last_run; i++)
            queries += problem.runs[i].last_query - problem.runs[i].first_query;
        for (int64_t t = task.first_tile; t < task.last_tile; t++) keys += problem.tiles[t].end - problem.tiles[t].begin;
        const int64_t row_bytes = problem.head_dim * sizeof(Element), value_bytes = problem.value_dim * sizeof(Element);
        const bool is_contiguous =
            problem.runs[task.last_run - 1].last_query - first_query == queries &&
            (keys == 0 || problem.tiles[task.last_tile - 1].end - first_key == keys);
        if (kv_head + 1 == problem.num_kv_heads || !is_contiguous ||
            (queries * group_heads + keys) * row_bytes + keys * value_bytes > kMaxBytes)
            return;
        blocks_[0] = block(problem.q, first_query, (kv_head + 1) * group_heads, queries, group_heads * row_bytes);
        blocks_[1] = block(problem.k, first_key, kv_head + 1, keys, row_bytes);
        blocks_[2] = block(problem.v, first_key, kv_head + 1, keys, value_bytes);
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

// The online softmax of `rows` queries, which are the scratch's rows from `row` on, over the tile's keys from `begin` on.
// If kLocal, their windows may hide keys. A function of its own: what surrounds it leaves it too few registers.
template <class Compute, bool kLocal>
[[gnu::noinline]] void softmax_of_rows(const ForwardScratch<Compute>& scratch, const View& view, int64_t query,
                                       int64_t row, int64_t rows, int64_t begin, int64_t keys, float scale, int64_t dim,
                                       int64_t ldb) {
    for (int64_t i = 0; i < rows; i++) {
        const float* scores = scratch.scores + i * kForwardBlockN;
        typename Compute::Word* p = scratch.p + i * (kForwardBlockN / Compute::kNumbers);
        float *sum = scratch.row_sum + (row + i) * kWidth, *acc = scratch.acc + (row + i) * ldb;
        const int64_t seen = view.keys_seen(query + i) - begin;
        if constexpr (kLocal) {
            const int64_t unseen = view.keys_unseen(query + i) - begin;
            if (unseen > 0) {
                online_softmax<Compute, true>(scores, p, unseen, seen, keys, scale, scratch.row_max[row + i], sum, acc,
                                              dim);
                continue;
            }
        }
        online_softmax<Compute, false>(scores, p, 0, seen, keys, scale, scratch.row_max[row + i], sum, acc, dim);
    }
}

// Adds one tile to a run's queries, for one query head. `row_of_run` is the scratch row of the run's first query.
template <class Compute, class Element>
void forward_tile(const Problem& problem, const ForwardScratch<Compute>& scratch, const Sizes<Compute>& sizes,
                  const Sizes<Compute>& value_sizes, const Run& run, const View& view, int64_t row_of_run,
                  NextHead<Element>& next_head) {
    typedef typename Compute::Word Word;
    const int64_t dim = problem.value_dim;
    for (int64_t query = view.first_query; query < view.last_query;) {
        const int64_t rest = view.last_query - query, all = min(kForwardBlockM, rest);
        const int64_t m = view.is_unmasked(query, query + all - 1) ? all : min(kForwardMaskedBlockM, rest);
        const int64_t row = row_of_run + query - run.first_query;
        // The keys that the block sees. None sees those before `begin`.
        const int64_t begin = view.keys_unseen(query) / kWidth * kWidth;
        const int64_t n = view.keys_seen(query + m - 1) - begin;
        float* acc = scratch.acc + row * value_sizes.ldb;
        matmul<Compute, false>(m, n,
                               {scratch.queries + row * sizes.lda, sizes.lda, scratch.keys + begin, kForwardBlockN,
                                scratch.scores, kForwardBlockN, sizes.words, false});
        float scale = problem.scale;
        if (problem.softcap > 0) {
            cap_scores(scratch.scores, m, kForwardBlockN, n, scale, problem.softcap);
            scale = 1;
        }
        next_head.prefetch(m);
        if (view.floor == nullptr)
            softmax_of_rows<Compute, false>(scratch, view, query, row, m, begin, n, scale, dim, value_sizes.ldb);
        else
            softmax_of_rows<Compute, true>(scratch, view, query, row, m, begin, n, scale, dim, value_sizes.ldb);
        matmul<Compute, false>(m, dim,
                               Product<Word>{scratch.p, kForwardBlockN / Compute::kNumbers,
                                             scratch.values + begin / Compute::kNumbers * value_sizes.ldb,
                                             value_sizes.ldb, acc, value_sizes.ldb, sizes.k_over(n), true});
        query += m;
    }
}

// Writes the output and the LSE of a run's queries, for one query head.
template <class Compute, class Element>
void write_output(const Problem& problem, const ForwardScratch<Compute>& scratch, const Sizes<Compute>& value_sizes,
                  const Run& run, int64_t first_row, int64_t head) {
    const int64_t rows = run.last_query - run.first_query, dim = problem.value_dim;
    const Floats nothing_seen = broadcast(-__builtin_inff());
    for (int64_t begin = 0; begin < rows; begin += kWidth) {
        Floats denominator = sums_of_rows(scratch.row_sum + (first_row + begin) * kWidth);
        Floats row_max = load(scratch.row_max + first_row + begin), factor = broadcast(1.0f);
        if (problem.sinks != nullptr) {
            const Floats sink = broadcast(problem.sinks[head]), raised = maximum(row_max, sink);
            factor = row_max == nothing_seen ? Floats{} : exp(row_max - raised);
            denominator = denominator * factor + exp(sink - raised);
            row_max = raised;
        }
        const Floats divisors = denominator == 0.0f ? broadcast(1.0f) : denominator;  // 0: no key is seen, acc is 0
        const Floats lse = row_max + log(denominator);
        const Floats values = denominator == denominator ? (denominator == 0.0f ? nothing_seen : lse) : denominator;
        for (int64_t i = 0; i < min(kWidth, rows - begin); i++) {
            const int64_t query = run.first_query + begin + i;
            const float* acc = scratch.acc + (first_row + begin + i) * value_sizes.ldb;
            Element* out = head_of<Element>(problem.out, query, head);
            for (int64_t column = 0; column < dim; column += kWidth)
                store_first(out + column, load(acc + column) * factor[i] / divisors[i], dim - column);
            problem.lse[query * problem.num_heads + head] = values[i];
        }
    }
}

template <class Compute, class Element>
void forward_task(const Problem& problem, const Task& task, int64_t kv_head, void* block) {
    const int64_t group_heads = problem.num_heads / problem.num_kv_heads, first_head = kv_head * group_heads;
    const int64_t task_rows = rows_of(problem, task), rows = task_rows * group_heads;
    const int64_t first_row = problem.runs[task.first_run].row;
    const Sizes<Compute> sizes(problem.head_dim), value_sizes(problem.value_dim);
    const ForwardScratch<Compute> scratch(Workspace(block), rows, sizes, value_sizes);
    NextHead<Element> next_head(problem, task, kv_head);
    memset(scratch.acc, 0, rows * value_sizes.ldb * sizeof(float));
    memset(scratch.row_sum, 0, rows * kWidth * sizeof(float));
    for (int64_t row = 0; row < rows; row++) scratch.row_max[row] = -__builtin_inff();

    // Rows of the scratch: all queries of the task for the first query head, then for the next one, and so on.
    for (int64_t head = 0; head < group_heads; head++)
        for (int64_t i = task.first_run; i < task.last_run; i++) {
            const Run& run = problem.runs[i];
            const Rows<Element> q = {head_of<Element>(problem.q, run.first_query, first_head + head),
                                     problem.q.row_stride, run.last_query - run.first_query, problem.head_dim};
            pack_a<Compute>(q, scratch.queries + (head * task_rows + run.row - first_row) * sizes.lda, sizes.lda);
        }
    for (int64_t t = task.first_tile; t < task.last_tile; t++) {
        const Tile& tile = problem.tiles[t];
        bool is_packed = false;
        for (int64_t i = first_run_of(problem, task, tile);
             i < task.last_run && problem.runs[i].first_query < tile.last_query; i++) {
            const Run& run = problem.runs[i];
            const View view = view_of(problem, run, tile);
            if (view.first_query >= view.last_query) continue;
            if (!is_packed) {
                pack_b_transposed<Compute>(rows_of_tile<Element>(problem.k, tile, kv_head, problem.head_dim),
                                           scratch.keys, kForwardBlockN);
                pack_b<Compute>(rows_of_tile<Element>(problem.v, tile, kv_head, problem.value_dim), scratch.values,
                                value_sizes.ldb);
                is_packed = true;
            }
            for (int64_t head = 0; head < group_heads; head++)
                forward_tile(problem, scratch, sizes, value_sizes, run, view, head * task_rows + run.row - first_row,
                             next_head);
        }
    }
    for (int64_t head = 0; head < group_heads; head++)
        for (int64_t i = task.first_run; i < task.last_run; i++)
            write_output<Compute, Element>(problem, scratch, value_sizes, problem.runs[i],
                                           head * task_rows + problem.runs[i].row - first_row, first_head + head);
}

template <class Compute>
size_t forward_scratch_bytes(const Problem& problem, const Task& task) {
    const int64_t rows = rows_of(problem, task) * (problem.num_heads / problem.num_kv_heads);
    return ForwardScratch<Compute>(Workspace(nullptr), rows, Sizes<Compute>(problem.head_dim),
                                   Sizes<Compute>(problem.value_dim)).bytes;
}

}  // namespace
