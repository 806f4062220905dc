// Backward: the gradients of q, k and v from the output, its LSE and the gradients of both.
//
//     P = exp(scale q k^T - LSE)          dS = P * (dO v^T - (rowsum(dO * O) - dLSE))
//     dV = P^T dO          dK = scale dS^T q          dQ = scale dS k
//
// A unit computes P and dS of its keys once and takes all three gradients from them.
#pragma once

#include "forward.h"

namespace {

constexpr int64_t kBackwardRows = 64;          // queries a block
constexpr int64_t kBackwardDiagonalRows = 16;  // where queries see different keys

template <class Compute>
struct BackwardScratch {
    typedef typename Compute::Word Word;
    Word* keys_transposed;    // (steps, kBackwardTile)
    Word* values_transposed;  // (steps, kBackwardTile)
    Word* keys;               // (steps over kBackwardTile, stride)
    float* weights;           // (kBackwardRows, kBackwardTile): the scores, then P
    float* grad_weights;      // (kBackwardRows, kBackwardTile): dO v^T, then dS
    Word* weights_columns;    // (steps over kBackwardRows, kBackwardTile): P, its rows two a word with Pairs
    Word* grad_columns;       // likewise dS
    Word* grad_rows;          // (kBackwardRows, kBackwardTile in words): dS
    Word* queries;            // (rows, left_stride): q as left operand
    Word* grads;              // (rows, left_stride): dO likewise
    Word* query_steps;        // (steps over rows, stride): q as right operand
    Word* grad_steps;         // (steps over rows, stride): dO likewise
    float* lse;               // (rows,)
    float* delta;             // (rows,) rowsum(dO * O) - dLSE
    float* grad_q;            // (rows, stride)
    float* grad_k;            // (keys of the unit, stride)
    float* grad_v;            // (keys of the unit, stride)
    size_t bytes;

    BackwardScratch(void* block, int64_t rows, int64_t num_keys, const Sizes<Compute>& sizes) {
        Cutter cutter(block);
        const int64_t cells = kBackwardRows * lynx::kBackwardTile;
        keys_transposed = cutter.take<Word>(sizes.steps * lynx::kBackwardTile);
        values_transposed = cutter.take<Word>(sizes.steps * lynx::kBackwardTile);
        keys = cutter.take<Word>(sizes.steps_over(lynx::kBackwardTile) * sizes.stride);
        weights = cutter.take<float>(cells);
        grad_weights = cutter.take<float>(cells);
        queries = cutter.take<Word>(rows * sizes.left_stride);
        grads = cutter.take<Word>(rows * sizes.left_stride);
        if constexpr (Compute::kNumbers == 1) {  // one form of each serves all products
            weights_columns = weights;
            grad_columns = grad_rows = grad_weights;
            query_steps = queries;
            grad_steps = grads;
        } else {
            weights_columns = cutter.take<Word>(cells / Compute::kNumbers);
            grad_columns = cutter.take<Word>(cells / Compute::kNumbers);
            grad_rows = cutter.take<Word>(cells / Compute::kNumbers);
            query_steps = cutter.take<Word>(sizes.steps_over(rows) * sizes.stride);
            grad_steps = cutter.take<Word>(sizes.steps_over(rows) * sizes.stride);
        }
        lse = cutter.take<float>(rows);
        delta = cutter.take<float>(rows);
        grad_q = cutter.take<float>(rows * sizes.stride);
        grad_k = cutter.take<float>(num_keys * sizes.stride);
        grad_v = cutter.take<float>(num_keys * sizes.stride);
        bytes = cutter.used();
    }
};

// A run's rows in the scratch start at a step of the products over rows, so that no word mixes two runs.
template <class Compute>
int64_t rows_of(const lynx::Run& run) {
    return round_up(run.last_query - run.first_query, Compute::kNumbers);
}

template <class Compute>
int64_t rows_of(const lynx::Problem& problem, const lynx::Unit& unit) {
    int64_t rows = 0;
    for (int64_t i = unit.first_run; i < unit.last_run; i++) rows += rows_of<Compute>(problem.runs[i]);
    return rows;
}

// P and dS of some rows of a block: `count` of them, which make up one step of the products over rows.
template <class Compute>
LYNX_INLINE void differentiate(const BackwardScratch<Compute>& scratch, int64_t row_of_block, int64_t row,
                               const int64_t* keys_seen, int64_t keys_computed, float scale) {
    constexpr int kRows = Compute::kNumbers;
    const int64_t cell = row_of_block * lynx::kBackwardTile;
    for (int64_t key = 0; key < keys_computed; key += kWidth) {
        Floats weights[kRows], grads[kRows];
        for (int i = 0; i < kRows; i++) {
            const int64_t at = cell + i * lynx::kBackwardTile + key;
            weights[i] = exp(load(scratch.weights + at) * scale - scratch.lse[row + i]);
            if (keys_seen[i] < key + kWidth)
                weights[i] = lane_numbers() < (int32_t)(keys_seen[i] - key) ? weights[i] : Floats{};
            grads[i] = weights[i] * (load(scratch.grad_weights + at) - scratch.delta[row + i]);
            if (keys_seen[i] < key + kWidth)
                grads[i] = lane_numbers() < (int32_t)(keys_seen[i] - key) ? grads[i] : Floats{};
        }
        if constexpr (kRows == 1) {
            store(scratch.weights + cell + key, weights[0]);
            store(scratch.grad_weights + cell + key, grads[0]);
        } else {
            const Words even = to_bfloat16(grads[0]), odd = to_bfloat16(grads[1]);
            BFloat16* rows = reinterpret_cast<BFloat16*>(scratch.grad_rows) + cell + key;
            store_vector(rows, __builtin_convertvector(even, Halves));
            store_vector(rows + lynx::kBackwardTile, __builtin_convertvector(odd, Halves));
            store_vector(scratch.grad_columns + cell / 2 + key, even | odd << 16);
            store_vector(scratch.weights_columns + cell / 2 + key,
                         to_bfloat16(weights[0]) | to_bfloat16(weights[1]) << 16);
        }
    }
}

// What the queries of a run give to the gradients of one tile's keys, and take from the tile.
template <class Compute>
void differentiate_tile(const BackwardScratch<Compute>& scratch, const Sizes<Compute>& sizes, const lynx::Run& run,
                        const View& view, int64_t row_of_run, int64_t key_of_tile, float scale, int64_t dim) {
    typedef typename Compute::Word Word;
    constexpr int64_t kTile = lynx::kBackwardTile, kNumbers = Compute::kNumbers;
    float* grad_k = scratch.grad_k + key_of_tile * sizes.stride;
    float* grad_v = scratch.grad_v + key_of_tile * sizes.stride;
    const int64_t first = (view.first_query - run.first_query) / kNumbers * kNumbers, last = rows_of<Compute>(run);
    for (int64_t at = view.first_query < run.last_query ? first : last; at < last;) {
        const int64_t query = run.first_query + at, row = row_of_run + at;
        const bool is_whole = view.keys_seen(query) == view.size;
        const int64_t rows = smaller(is_whole ? kBackwardRows : kBackwardDiagonalRows, last - at);
        const int64_t keys = view.keys_seen(query + rows - 1);
        const Word* queries = scratch.queries + row * sizes.left_stride;
        const Word* grads = scratch.grads + row * sizes.left_stride;
        multiply<Compute, false>(rows, keys,
                                 Product<Word>{queries, sizes.left_stride, scratch.keys_transposed, kTile,
                                               scratch.weights, kTile, sizes.steps, false});
        multiply<Compute, false>(rows, keys,
                                 Product<Word>{grads, sizes.left_stride, scratch.values_transposed, kTile,
                                               scratch.grad_weights, kTile, sizes.steps, false});
        for (int64_t i = 0; i < rows; i += kNumbers) {
            int64_t keys_seen[kNumbers];
            for (int j = 0; j < kNumbers; j++) keys_seen[j] = view.keys_seen(query + i + j);
            differentiate(scratch, i, row + i, keys_seen, keys, scale);
        }
        const int64_t steps = sizes.steps_over(rows), step = row / kNumbers;
        multiply<Compute, true>(keys, dim,
                                Product<Word>{scratch.weights_columns, kTile, scratch.grad_steps + step * sizes.stride,
                                              sizes.stride, grad_v, sizes.stride, steps, true});
        multiply<Compute, true>(keys, dim,
                                Product<Word>{scratch.grad_columns, kTile, scratch.query_steps + step * sizes.stride,
                                              sizes.stride, grad_k, sizes.stride, steps, true});
        multiply<Compute, false>(rows, dim,
                                 Product<Word>{scratch.grad_rows, kTile / kNumbers, scratch.keys, sizes.stride,
                                               scratch.grad_q + row * sizes.stride, sizes.stride,
                                               sizes.steps_over(keys), true});
        at += rows;
    }
}

// q and dO of a run, and what its rows know beside them.
template <class Compute, class Element>
void pack_run(const lynx::Problem& problem, const BackwardScratch<Compute>& scratch, const Sizes<Compute>& sizes,
              const lynx::Run& run, int64_t first_row, int64_t head) {
    const int64_t queries = run.last_query - run.first_query, dim = problem.head_dim;
    auto pack = [&](const lynx::Matrix& matrix, typename Compute::Word* left, typename Compute::Word* right) {
        const Rows<Element> rows = {head_of<Element>(matrix, run.first_query, head), matrix.row_stride, queries, dim};
        pack_left<Compute>(rows, left + first_row * sizes.left_stride, sizes.left_stride);
        if constexpr (Compute::kNumbers > 1) {
            pack_right<Compute>(rows, right + first_row / Compute::kNumbers * sizes.stride, sizes.stride);
            for (int64_t row = queries; row < rows_of<Compute>(run); row++)
                memset(left + (first_row + row) * sizes.left_stride, 0, sizes.left_stride * sizeof *left);
        }
    };
    pack(problem.q, scratch.queries, scratch.query_steps);
    pack(problem.grad, scratch.grads, scratch.grad_steps);
    for (int64_t row = 0; row < rows_of<Compute>(run); row++) {
        float lse = 0, delta = 0;  // of a row that only fills up a word: what it gives is multiplied by zeros
        if (row < queries) {
            const int64_t query = run.first_query + row, at = query * problem.num_heads + head;
            const Element* grad = head_of<Element>(problem.grad, query, head);
            const Element* out = head_of<Element>(problem.out, query, head);
            Floats sum = {};
            for (int64_t column = 0; column < dim; column += kWidth)
                sum += load_first(grad + column, dim - column) * load_first(out + column, dim - column);
            lse = problem.lse[at];
            delta = sum_of_lanes(sum) - (problem.grad_lse == nullptr ? 0 : problem.grad_lse[at]);
        }
        scratch.lse[first_row + row] = lse;
        scratch.delta[first_row + row] = delta;
    }
}

// factor * sums (count, dim), into consecutive rows of a gradient.
template <class Element>
void write(Element* to, int64_t row_stride, const float* sums, int64_t stride, int64_t count, int64_t dim,
           float factor) {
    for (int64_t row = 0; row < count; row++)
        for (int64_t column = 0; column < dim; column += kWidth)
            store_first(to + row * row_stride + column, load(sums + row * stride + column) * factor, dim - column);
}

template <class Compute, class Element>
void backward(const lynx::Problem& problem, const lynx::Unit& unit, int64_t kv_head, void* block) {
    const int64_t dim = problem.head_dim, group_heads = problem.num_heads / problem.num_kv_heads;
    const int64_t rows = rows_of<Compute>(problem, unit);
    const int64_t first_key = problem.tiles[unit.first_tile].begin;
    const int64_t num_keys = problem.tiles[unit.last_tile - 1].end - first_key;
    const Sizes<Compute> sizes(dim);
    const BackwardScratch<Compute> scratch(block, rows, num_keys, sizes);
    memset(scratch.grad_k, 0, num_keys * sizes.stride * sizeof(float));
    memset(scratch.grad_v, 0, num_keys * sizes.stride * sizeof(float));

    for (int64_t head = kv_head * group_heads; head < (kv_head + 1) * group_heads; head++) {
        memset(scratch.grad_q, 0, rows * sizes.stride * sizeof(float));
        for (int64_t i = unit.first_run, row = 0; i < unit.last_run; row += rows_of<Compute>(problem.runs[i++]))
            pack_run<Compute, Element>(problem, scratch, sizes, problem.runs[i], row, head);
        for (int64_t t = unit.first_tile; t < unit.last_tile; t++) {
            const lynx::Tile& tile = problem.tiles[t];
            const Rows<Element> k = {head_of<Element>(problem.k, tile.begin, kv_head), problem.k.row_stride,
                                     tile.end - tile.begin, dim};
            const Rows<Element> v = {head_of<Element>(problem.v, tile.begin, kv_head), problem.v.row_stride,
                                     tile.end - tile.begin, dim};
            pack_transposed<Compute>(k, scratch.keys_transposed, lynx::kBackwardTile);
            pack_transposed<Compute>(v, scratch.values_transposed, lynx::kBackwardTile);
            pack_right<Compute>(k, scratch.keys, sizes.stride);
            for (int64_t i = unit.first_run, row = 0; i < unit.last_run; row += rows_of<Compute>(problem.runs[i++]))
                differentiate_tile(scratch, sizes, problem.runs[i], view_of(problem.runs[i], tile), row,
                                   tile.begin - first_key, problem.scale, dim);
        }
        for (int64_t i = unit.first_run, row = 0; i < unit.last_run; row += rows_of<Compute>(problem.runs[i++])) {
            const int64_t query = problem.runs[i].first_query, count = problem.runs[i].last_query - query;
            const float* sums = scratch.grad_q + row * sizes.stride;
            if (unit.is_split) {
                const int64_t row_stride = problem.num_heads * dim;
                float* part = problem.partial_grad_q + (unit.part * problem.num_queries + query) * row_stride;
                write(part + head * dim, row_stride, sums, sizes.stride, count, dim, problem.scale);
            } else {
                write(head_of<Element>(problem.grad_q, query, head), problem.grad_q.row_stride, sums, sizes.stride,
                      count, dim, problem.scale);
            }
        }
    }
    write(head_of<Element>(problem.grad_k, first_key, kv_head), problem.grad_k.row_stride, scratch.grad_k,
          sizes.stride, num_keys, dim, problem.scale);
    write(head_of<Element>(problem.grad_v, first_key, kv_head), problem.grad_v.row_stride, scratch.grad_v,
          sizes.stride, num_keys, dim, 1);
}

template <class Compute>
size_t backward_scratch_bytes(const lynx::Problem& problem, const lynx::Unit& unit) {
    const int64_t num_keys = problem.tiles[unit.last_tile - 1].end - problem.tiles[unit.first_tile].begin;
    return BackwardScratch<Compute>(nullptr, rows_of<Compute>(problem, unit), num_keys,
                                    Sizes<Compute>(problem.head_dim)).bytes;
}

}  // namespace
