// Backward: dq, dk and dv from the output, its LSE and the gradients of both.
//
//     P = exp(scale q k^T - LSE)          dS = P * (dO v^T - delta)          delta = rowsum(dO * O) - dLSE
//     dv = P^T dO          dk = scale dS^T q          dq = scale dS k
//
// With a soft cap c, dS is multiplied by 1 - (S / c)^2, S being the capped scores.
//
// A task computes P and dS of its keys once, and all three gradients from them.
#pragma once

#include "forward.h"

namespace {

constexpr int64_t kBackwardBlockM = 64;        // queries
constexpr int64_t kBackwardMaskedBlockM = 16;  // in masked tiles

template <class Compute>
struct BackwardScratch {
    typedef typename Compute::Word Word;
    Word* keys_transposed;    // (words, kBackwardBlockN)
    Word* values_transposed;  // (words, kBackwardBlockN)
    Word* keys;               // (words over kBackwardBlockN, ldb)
    float* p;                 // (kBackwardBlockM, kBackwardBlockN): the scores, then P
    float* ds;                // (kBackwardBlockM, kBackwardBlockN): dO v^T, then dS
    Word* p_over_rows;        // (words over kBackwardBlockM, kBackwardBlockN): P, to be transposed
    Word* ds_over_rows;       // likewise dS
    Word* ds_over_keys;       // (kBackwardBlockM, kBackwardBlockN in words): dS
    Word* q_a;                // (rows, lda): q as operand a
    Word* dout_a;             // (rows, lda of values): dO likewise
    Word* q_b;                // (words over rows, ldb): q as operand b
    Word* dout_b;             // (words over rows, ldb of values): dO likewise
    float* lse;               // (rows,)
    float* delta;             // (rows,)
    float* dq;                // (rows, ldb)
    float* dk;                // (keys of the task, ldb)
    float* dv;                // (keys of the task, ldb of values)
    size_t bytes;

    BackwardScratch(void* block, int64_t rows, int64_t num_keys, const Sizes<Compute>& sizes,
                    const Sizes<Compute>& value_sizes) {
        Workspace workspace(block);
        const int64_t cells = kBackwardBlockM * kBackwardBlockN;
        keys_transposed = workspace.take<Word>(sizes.words * kBackwardBlockN);
        values_transposed = workspace.take<Word>(value_sizes.words * kBackwardBlockN);
        keys = workspace.take<Word>(sizes.k_over(kBackwardBlockN) * sizes.ldb);
        p = workspace.take<float>(cells);
        ds = workspace.take<float>(cells);
        q_a = workspace.take<Word>(rows * sizes.lda);
        dout_a = workspace.take<Word>(rows * value_sizes.lda);
        if constexpr (Compute::kNumbers == 1) {  // one form serves all products
            p_over_rows = p;
            ds_over_rows = ds_over_keys = ds;
            q_b = q_a;
            dout_b = dout_a;
        } else {
            p_over_rows = workspace.take<Word>(cells / Compute::kNumbers);
            ds_over_rows = workspace.take<Word>(cells / Compute::kNumbers);
            ds_over_keys = workspace.take<Word>(cells / Compute::kNumbers);
            q_b = workspace.take<Word>(sizes.k_over(rows) * sizes.ldb);
            dout_b = workspace.take<Word>(sizes.k_over(rows) * value_sizes.ldb);
        }
        lse = workspace.take<float>(rows);
        delta = workspace.take<float>(rows);
        dq = workspace.take<float>(rows * sizes.ldb);
        dk = workspace.take<float>(num_keys * sizes.ldb);
        dv = workspace.take<float>(num_keys * value_sizes.ldb);
        bytes = workspace.bytes();
    }
};

// A run's rows in the scratch start at a whole word of the products over rows, so that no word mixes two runs.
template <class Compute>
int64_t rows_of(const Run& run) {
    return round_up(run.last_query - run.first_query, Compute::kNumbers);
}

// Calls body(run, row) for the runs of a task; `row` is the scratch row of the run's first query.
template <class Body>
LYNX_INLINE void for_runs(const Problem& problem, const Task& task, Body body) {
    for (int64_t i = task.first_run; i < task.last_run; i++)
        body(problem.runs[i], problem.runs[i].row - problem.runs[task.first_run].row);
}

// How a block's scores become P and dS.
struct Scores {
    float scale, softcap;
};

// P and dS of the rows of a block that share a word of the products over rows.
template <class Compute, bool kCapped>
LYNX_INLINE void softmax_backward(const BackwardScratch<Compute>& scratch, int64_t row_of_block, int64_t row,
                                  const int64_t* keys_unseen, const int64_t* keys_seen, int64_t keys_computed,
                                  const Scores& scores) {
    constexpr int kRows = Compute::kNumbers;
    const int64_t cell = row_of_block * kBackwardBlockN;
    for (int64_t key = 0; key < keys_computed; key += kWidth) {
        Floats p[kRows], ds[kRows];
        for (int i = 0; i < kRows; i++) {
            const int64_t at = cell + i * kBackwardBlockN + key;
            Floats score = load(scratch.p + at) * scores.scale, derivative;
            if constexpr (kCapped) {
                const Floats capped = tanh(score / scores.softcap);
                derivative = 1.0f - capped * capped;
                score = capped * scores.softcap;
            }
            p[i] = exp(score - scratch.lse[row + i]);
            ds[i] = p[i] * (load(scratch.ds + at) - scratch.delta[row + i]);
            if constexpr (kCapped) ds[i] *= derivative;
            if (keys_seen[i] < key + kWidth || keys_unseen[i] > key) {
                const Ints seen = (lane_numbers() < (int32_t)(keys_seen[i] - key)) &
                                  (lane_numbers() >= (int32_t)(keys_unseen[i] - key));
                p[i] = seen ? p[i] : Floats{};
                ds[i] = seen ? ds[i] : Floats{};
            }
        }
        if constexpr (kRows == 1) {
            store(scratch.p + cell + key, p[0]);
            store(scratch.ds + cell + key, ds[0]);
        } else {
            const Words even = to_bfloat16(ds[0]), odd = to_bfloat16(ds[1]);
            BFloat16* rows = reinterpret_cast<BFloat16*>(scratch.ds_over_keys) + cell + key;
            store_vector(rows, __builtin_convertvector(even, Halves));
            store_vector(rows + kBackwardBlockN, __builtin_convertvector(odd, Halves));
            store_vector(scratch.ds_over_rows + cell / 2 + key, even | odd << 16);
            store_vector(scratch.p_over_rows + cell / 2 + key, to_bfloat16(p[0]) | to_bfloat16(p[1]) << 16);
        }
    }
}

// What the queries of a run add to dk and dv of one tile, and the tile to their dq.
template <class Compute, bool kCapped>
void backward_tile(const Problem& problem, const BackwardScratch<Compute>& scratch, const Sizes<Compute>& sizes,
                   const Sizes<Compute>& value_sizes, const Run& run, const View& view, int64_t row_of_run,
                   int64_t key_of_tile) {
    typedef Product<typename Compute::Word> Product;
    constexpr int64_t kN = kBackwardBlockN, kNumbers = Compute::kNumbers;
    const Scores scores = {problem.scale, problem.softcap};
    const int64_t last_query = run.last_query - 1;  // a row behind it, which only fills up a word, holds zeros
    const int64_t last = round_up(view.last_query - run.first_query, kNumbers);
    for (int64_t at = (view.first_query - run.first_query) / kNumbers * kNumbers; at < last;) {
        const int64_t query = run.first_query + at, row = row_of_run + at;
        const int64_t all = min(kBackwardBlockM, last - at);
        const bool is_unmasked = view.is_unmasked(query, min(query + all - 1, last_query));
        const int64_t m = is_unmasked ? all : min(kBackwardMaskedBlockM, last - at);
        // The keys that the block sees. None sees those before `begin`.
        const int64_t begin = view.keys_unseen(query) / kWidth * kWidth;
        const int64_t n = view.keys_seen(min(query + m - 1, last_query)) - begin;
        at += m;
        if (n <= 0) continue;
        matmul<Compute, false>(m, n,
                               Product{scratch.q_a + row * sizes.lda, sizes.lda, scratch.keys_transposed + begin, kN,
                                       scratch.p, kN, sizes.words, false});
        matmul<Compute, false>(m, n,
                               Product{scratch.dout_a + row * value_sizes.lda, value_sizes.lda,
                                       scratch.values_transposed + begin, kN, scratch.ds, kN, value_sizes.words,
                                       false});
        for (int64_t i = 0; i < m; i += kNumbers) {
            int64_t keys_unseen[kNumbers], keys_seen[kNumbers];
            for (int j = 0; j < kNumbers; j++) {
                const int64_t of_row = min(query + i + j, last_query);
                keys_unseen[j] = view.keys_unseen(of_row) - begin;
                keys_seen[j] = view.keys_seen(of_row) - begin;
            }
            softmax_backward<Compute, kCapped>(scratch, i, row + i, keys_unseen, keys_seen, n, scores);
        }
        const int64_t k = sizes.k_over(m), word = row / kNumbers, key = key_of_tile + begin;
        matmul<Compute, true>(n, problem.value_dim,
                              Product{scratch.p_over_rows, kN, scratch.dout_b + word * value_sizes.ldb,
                                      value_sizes.ldb, scratch.dv + key * value_sizes.ldb, value_sizes.ldb, k, true});
        matmul<Compute, true>(n, problem.head_dim,
                              Product{scratch.ds_over_rows, kN, scratch.q_b + word * sizes.ldb, sizes.ldb,
                                      scratch.dk + key * sizes.ldb, sizes.ldb, k, true});
        matmul<Compute, false>(m, problem.head_dim,
                               Product{scratch.ds_over_keys, kN / kNumbers,
                                       scratch.keys + begin / kNumbers * sizes.ldb, sizes.ldb,
                                       scratch.dq + row * sizes.ldb, sizes.ldb, sizes.k_over(n), true});
    }
}

// q, dO, LSE and delta of a run's rows.
template <class Compute, class Element>
void pack_run(const Problem& problem, const BackwardScratch<Compute>& scratch, const Sizes<Compute>& sizes,
              const Sizes<Compute>& value_sizes, const Run& run, int64_t first_row, int64_t head) {
    const int64_t queries = run.last_query - run.first_query;
    auto pack = [&](const Matrix& matrix, int64_t dim, const Sizes<Compute>& sizes, typename Compute::Word* a,
                    typename Compute::Word* b) {
        const Rows<Element> rows = {head_of<Element>(matrix, run.first_query, head), matrix.row_stride, queries, dim};
        pack_a<Compute>(rows, a + first_row * sizes.lda, sizes.lda);
        if constexpr (Compute::kNumbers > 1) {
            pack_b<Compute>(rows, b + first_row / Compute::kNumbers * sizes.ldb, sizes.ldb);
            for (int64_t row = queries; row < rows_of<Compute>(run); row++)
                memset(a + (first_row + row) * sizes.lda, 0, sizes.lda * sizeof *a);
        }
    };
    pack(problem.q, problem.head_dim, sizes, scratch.q_a, scratch.q_b);
    pack(problem.dout, problem.value_dim, value_sizes, scratch.dout_a, scratch.dout_b);
    for (int64_t row = 0; row < rows_of<Compute>(run); row++) {
        float lse = 0, delta = 0;  // of a row that only fills up a word: it is multiplied by zeros
        if (row < queries) {
            const int64_t query = run.first_query + row, at = query * problem.num_heads + head;
            const int64_t dim = problem.value_dim;
            const Element* dout = head_of<Element>(problem.dout, query, head);
            const Element* out = head_of<Element>(problem.out, query, head);
            Floats sum = {};
            for (int64_t column = 0; column < dim; column += kWidth)
                sum += load_first(dout + column, dim - column) * load_first(out + column, dim - column);
            lse = problem.lse[at];
            delta = sum_of_lanes(sum) - (problem.dlse == nullptr ? 0 : problem.dlse[at]);
        }
        scratch.lse[first_row + row] = lse;
        scratch.delta[first_row + row] = delta;
    }
}

// Writes factor * sums (count, dim) into consecutive rows of a gradient.
template <class Element>
void write(Element* to, int64_t row_stride, const float* sums, int64_t stride, int64_t count, int64_t dim,
           float factor) {
    for (int64_t row = 0; row < count; row++)
        for (int64_t column = 0; column < dim; column += kWidth)
            store_first(to + row * row_stride + column, load(sums + row * stride + column) * factor, dim - column);
}

template <class Compute, class Element>
void backward_task(const Problem& problem, const Task& task, int64_t kv_head, void* block) {
    const int64_t dim = problem.head_dim, group_heads = problem.num_heads / problem.num_kv_heads;
    const int64_t rows = rows_of(problem, task);
    const int64_t first_key = problem.tiles[task.first_tile].begin;
    const int64_t num_keys = problem.tiles[task.last_tile - 1].end - first_key;
    const Sizes<Compute> sizes(dim), value_sizes(problem.value_dim);
    const BackwardScratch<Compute> scratch(block, rows, num_keys, sizes, value_sizes);
    const auto tile_of_run = problem.softcap > 0 ? backward_tile<Compute, true> : backward_tile<Compute, false>;
    memset(scratch.dk, 0, num_keys * sizes.ldb * sizeof(float));
    memset(scratch.dv, 0, num_keys * value_sizes.ldb * sizeof(float));

    for (int64_t head = kv_head * group_heads; head < (kv_head + 1) * group_heads; head++) {
        memset(scratch.dq, 0, rows * sizes.ldb * sizeof(float));
        for_runs(problem, task, [&](const Run& run, int64_t row) {
            pack_run<Compute, Element>(problem, scratch, sizes, value_sizes, run, row, head);
        });
        for (int64_t t = task.first_tile; t < task.last_tile; t++) {
            const Tile& tile = problem.tiles[t];
            const Rows<Element> k = rows_of_tile<Element>(problem.k, tile, kv_head, dim);
            const Rows<Element> v = rows_of_tile<Element>(problem.v, tile, kv_head, problem.value_dim);
            pack_b_transposed<Compute>(k, scratch.keys_transposed, kBackwardBlockN);
            pack_b_transposed<Compute>(v, scratch.values_transposed, kBackwardBlockN);
            pack_b<Compute>(k, scratch.keys, sizes.ldb);
            for (int64_t i = first_run_of(problem, task, tile);
                 i < task.last_run && problem.runs[i].first_query < tile.last_query; i++) {
                const Run& run = problem.runs[i];
                const View view = view_of(problem, run, tile);
                if (view.first_query < view.last_query)
                    tile_of_run(problem, scratch, sizes, value_sizes, run, view,
                                run.row - problem.runs[task.first_run].row, tile.begin - first_key);
            }
        }
        for_runs(problem, task, [&](const Run& run, int64_t row) {
            const int64_t query = run.first_query, count = run.last_query - query;
            const float* dq = scratch.dq + row * sizes.ldb;
            if (task.is_split) {
                const int64_t row_stride = problem.num_heads * dim;
                float* split = problem.dq_splits + (task.split * problem.num_queries + query) * row_stride;
                write(split + head * dim, row_stride, dq, sizes.ldb, count, dim, problem.scale);
            } else {
                write(head_of<Element>(problem.dq, query, head), problem.dq.row_stride, dq, sizes.ldb, count, dim,
                      problem.scale);
            }
        });
    }
    write(head_of<Element>(problem.dk, first_key, kv_head), problem.dk.row_stride, scratch.dk, sizes.ldb, num_keys, dim,
          problem.scale);
    write(head_of<Element>(problem.dv, first_key, kv_head), problem.dv.row_stride, scratch.dv, value_sizes.ldb,
          num_keys, problem.value_dim, 1);
}

template <class Compute>
size_t backward_scratch_bytes(const Problem& problem, const Task& task) {
    const int64_t num_keys = problem.tiles[task.last_tile - 1].end - problem.tiles[task.first_tile].begin;
    return BackwardScratch<Compute>(nullptr, rows_of(problem, task), num_keys, Sizes<Compute>(problem.head_dim),
                                    Sizes<Compute>(problem.value_dim)).bytes;
}

}  // namespace
