// Forward: out = softmax(scale q k^T) v and the log of the softmax's denominator, one key tile after another.
#pragma once

#include "problem.h"
#include "scratch.h"
#include "visibility.h"
#include "online_softmax.h"

namespace {

constexpr int64_t kForwardRows = 48;           // queries a block: 8 register tiles
constexpr int64_t kForwardDiagonalRows = 12;   // where queries see different keys: what none of a block sees is skipped

template <class Compute>
struct ForwardScratch {
    typedef typename Compute::Word Word;
    Word* keys;       // (steps, kForwardTile): k^T of a tile
    Word* values;     // (steps over kForwardTile, stride)
    Word* weights;    // (kForwardRows, weights_stride)
    float* scores;    // (kForwardRows, kForwardTile)
    Word* queries;    // (rows, left_stride)
    float* sums;      // (rows, stride): the output, not yet divided
    float* total;     // (rows and a vector of them, kWidth): the denominator, its lanes not yet added up
    float* maximum;   // (rows and a vector of them,)
    size_t bytes;

    ForwardScratch(void* block, int64_t rows, const Sizes<Compute>& sizes) {
        Cutter cutter(block);
        keys = cutter.take<Word>(sizes.steps * lynx::kForwardTile);
        values = cutter.take<Word>(sizes.steps_over(lynx::kForwardTile) * sizes.stride);
        scores = cutter.take<float>(kForwardRows * lynx::kForwardTile);
        // fp32 weights take the place of their scores
        weights = Compute::kNumbers == 1 ? reinterpret_cast<Word*>(scores)
                                         : cutter.take<Word>(kForwardRows * lynx::kForwardTile / Compute::kNumbers);
        queries = cutter.take<Word>(rows * sizes.left_stride);
        sums = cutter.take<float>(rows * sizes.stride);
        total = cutter.take<float>((rows + kWidth) * kWidth);
        maximum = cutter.take<float>(rows + kWidth);
        bytes = cutter.used();
    }
};

inline int64_t queries_of(const lynx::Problem& problem, const lynx::Unit& unit) {
    int64_t queries = 0;
    for (int64_t i = unit.first_run; i < unit.last_run; i++)
        queries += problem.runs[i].last_query - problem.runs[i].first_query;
    return queries;
}

// What the unit will read of the next key head, asked for in steps while this one is computed. Short samples spent a
// quarter of their time on waiting for memory.
template <class Element>
class Ahead {
   public:
    Ahead(const lynx::Problem& problem, const lynx::Unit& unit, int64_t kv_head, int64_t queries) {
        const int64_t group_heads = problem.num_heads / problem.num_kv_heads;
        const int64_t first_query = problem.runs[unit.first_run].first_query;
        const int64_t first_key = unit.first_tile < unit.last_tile ? problem.tiles[unit.first_tile].begin : 0;
        const int64_t keys = unit.first_tile < unit.last_tile ? problem.tiles[unit.last_tile - 1].end - first_key : 0;
        const int64_t row_bytes = problem.head_dim * sizeof(Element);
        const bool is_contiguous = problem.runs[unit.last_run - 1].last_query - first_query == queries;
        if (kv_head + 1 == problem.num_kv_heads || !is_contiguous ||
            (queries * group_heads + 2 * keys) * row_bytes > kMostBytes)
            return;
        parts_[0] = part(problem.q, first_query, (kv_head + 1) * group_heads, queries, group_heads * row_bytes);
        parts_[1] = part(problem.k, first_key, kv_head + 1, keys, row_bytes);
        parts_[2] = part(problem.v, first_key, kv_head + 1, keys, row_bytes);
        queries_ = queries;
    }

    // To be called with all queries, some at a time; further calls do nothing.
    void ask(int64_t queries) {
        if (asked_ >= queries_) return;
        for (const Part& part : parts_) {
            const int64_t last = smaller(asked_ + queries, queries_) * part.rows / queries_;
            for (int64_t row = asked_ * part.rows / queries_; row < last; row++)
                for (int64_t byte = 0; byte < part.row_bytes; byte += 64)
                    __builtin_prefetch(part.first + row * part.stride + byte, 0, 2);
        }
        asked_ += queries;
    }

   private:
    static constexpr int64_t kMostBytes = 1 << 18;  // a part of the cache that this head does not need

    struct Part {
        const char* first;
        int64_t rows, stride, row_bytes;
    };

    static Part part(const lynx::Matrix& matrix, int64_t row, int64_t head, int64_t rows, int64_t row_bytes) {
        return {reinterpret_cast<const char*>(head_of<Element>(matrix, row, head)), rows,
                matrix.row_stride * static_cast<int64_t>(sizeof(Element)), row_bytes};
    }

    Part parts_[3] = {};
    int64_t queries_ = 0, asked_ = 0;
};

// One tile's part of a run's queries, for one query head. Rows of the scratch arguments are the run's queries.
template <class Compute, class Element>
void attend_to_tile(const ForwardScratch<Compute>& scratch, const Sizes<Compute>& sizes, const lynx::Run& run,
                    const View& view, int64_t row_of_run, float scale, int64_t dim, Ahead<Element>& ahead) {
    typedef typename Compute::Word Word;
    const int64_t weights_stride = lynx::kForwardTile / Compute::kNumbers;
    for (int64_t query = view.first_query; query < run.last_query;) {
        const bool is_whole = view.keys_seen(query) == view.size;
        const int64_t rows = smaller(is_whole ? kForwardRows : kForwardDiagonalRows, run.last_query - query);
        const int64_t row = row_of_run + query - run.first_query;
        const int64_t keys = view.keys_seen(query + rows - 1);
        float* sums = scratch.sums + row * sizes.stride;
        multiply<Compute, false>(
            rows, keys,
            {scratch.queries + row * sizes.left_stride, sizes.left_stride, scratch.keys, lynx::kForwardTile,
             scratch.scores, lynx::kForwardTile, sizes.steps, false});
        ahead.ask(rows);
        for (int64_t i = 0; i < rows; i++)
            weigh<Compute>(scratch.scores + i * lynx::kForwardTile, scratch.weights + i * weights_stride,
                           view.keys_seen(query + i), keys, scale, scratch.maximum[row + i],
                           scratch.total + (row + i) * kWidth, sums + i * sizes.stride, dim);
        multiply<Compute, false>(rows, dim,
                                 Product<Word>{scratch.weights, weights_stride, scratch.values, sizes.stride, sums,
                                               sizes.stride, sizes.steps_over(keys), true});
        query += rows;
    }
}

// Divide by the denominators and write what the queries of `run` have, for one query head.
template <class Compute, class Element>
void finish(const lynx::Problem& problem, const ForwardScratch<Compute>& scratch, const Sizes<Compute>& sizes,
            const lynx::Run& run, int64_t first_row, int64_t head) {
    const int64_t rows = run.last_query - run.first_query, dim = problem.head_dim;
    for (int64_t begin = 0; begin < rows; begin += kWidth) {
        const Floats denominator = sums_of_rows(scratch.total + (first_row + begin) * kWidth);
        const Floats divisors = denominator == 0.0f ? broadcast(1.0f) : denominator;  // no key is seen: the sums are 0
        const Floats lse = load(scratch.maximum + first_row + begin) + log(denominator);
        const Floats nothing_seen = broadcast(-__builtin_inff());
        const Floats values = denominator == denominator ? (denominator == 0.0f ? nothing_seen : lse) : denominator;
        for (int64_t i = 0; i < smaller(kWidth, rows - begin); i++) {
            const int64_t query = run.first_query + begin + i;
            const float* sums = scratch.sums + (first_row + begin + i) * sizes.stride;
            Element* out = head_of<Element>(problem.out, query, head);
            for (int64_t column = 0; column < dim; column += kWidth)
                store_first(out + column, load(sums + column) / divisors[i], dim - column);
            problem.lse[query * problem.num_heads + head] = values[i];
        }
    }
}

template <class Compute, class Element>
void forward(const lynx::Problem& problem, const lynx::Unit& unit, int64_t kv_head, void* block) {
    const int64_t dim = problem.head_dim, group_heads = problem.num_heads / problem.num_kv_heads;
    const int64_t queries = queries_of(problem, unit), rows = queries * group_heads;
    const int64_t first_head = kv_head * group_heads;
    const Sizes<Compute> sizes(dim);
    const ForwardScratch<Compute> scratch(block, rows, sizes);
    const float scale = problem.scale;
    Ahead<Element> ahead(problem, unit, kv_head, queries);
    memset(scratch.sums, 0, rows * sizes.stride * sizeof(float));
    memset(scratch.total, 0, rows * kWidth * sizeof(float));
    for (int64_t row = 0; row < rows; row++) scratch.maximum[row] = -__builtin_inff();

    // Rows: query head after query head, each all queries of the unit.
    for (int64_t head = 0; head < group_heads; head++) {
        int64_t row = head * queries;
        for (int64_t i = unit.first_run; i < unit.last_run; i++) {
            const lynx::Run& run = problem.runs[i];
            const Rows<Element> part = {head_of<Element>(problem.q, run.first_query, first_head + head),
                                        problem.q.row_stride, run.last_query - run.first_query, dim};
            pack_left<Compute>(part, scratch.queries + row * sizes.left_stride, sizes.left_stride);
            row += part.count;
        }
    }
    for (int64_t t = unit.first_tile; t < unit.last_tile; t++) {
        const lynx::Tile& tile = problem.tiles[t];
        bool is_packed = false;
        int64_t row = 0;
        for (int64_t i = unit.first_run; i < unit.last_run; i++) {
            const lynx::Run& run = problem.runs[i];
            const View view = view_of(run, tile);
            if (view.first_query < run.last_query && !is_packed) {
                const int64_t count = tile.end - tile.begin;
                const Rows<Element> k = {head_of<Element>(problem.k, tile.begin, kv_head), problem.k.row_stride, count,
                                         dim};
                const Rows<Element> v = {head_of<Element>(problem.v, tile.begin, kv_head), problem.v.row_stride, count,
                                         dim};
                pack_transposed<Compute>(k, scratch.keys, lynx::kForwardTile);
                pack_right<Compute>(v, scratch.values, sizes.stride);
                is_packed = true;
            }
            for (int64_t head = 0; head < group_heads; head++)
                attend_to_tile(scratch, sizes, run, view, head * queries + row, scale, dim, ahead);
            row += run.last_query - run.first_query;
        }
    }
    for (int64_t head = 0; head < group_heads; head++) {
        int64_t row = head * queries;
        for (int64_t i = unit.first_run; i < unit.last_run; i++) {
            finish<Compute, Element>(problem, scratch, sizes, problem.runs[i], row, first_head + head);
            row += problem.runs[i].last_query - problem.runs[i].first_query;
        }
    }
}

template <class Compute>
size_t forward_scratch_bytes(const lynx::Problem& problem, const lynx::Unit& unit) {
    const int64_t rows = queries_of(problem, unit) * (problem.num_heads / problem.num_kv_heads);
    return ForwardScratch<Compute>(nullptr, rows, Sizes<Compute>(problem.head_dim)).bytes;
}

}  // namespace
