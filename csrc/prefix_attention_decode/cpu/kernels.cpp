// The kernels of decoding of one instruction set. Compiled once for each, with LYNX_KERNELS the name of the result.
//
// Few rows read many keys, so what counts is that every key and value is read from memory once, and soon. Keys are read
// where they stand and turned into columns a tile at a time. A tile is short, and done for one head after another: where
// heads stand side by side this reads memory in its order, from few pages at a time. While a head is computed, the keys
// and values of the next one are asked for.
#include "problem.h"
#include "attention_common/cpu/scratch.h"
#include "attention_common/cpu/online_softmax.h"

namespace {

using lynx::DecodeProblem;
using lynx::Part;
using lynx::Segment;

#if defined(__AVX512BF16__)
typedef Pairs BFloat16Compute;
#else
typedef Single BFloat16Compute;  // widened when packed
#endif

constexpr int64_t kRows = 48;  // a block: 8 register tiles
constexpr int64_t kStep = 16;  // rows of a cache that are asked for at once, a multiple of every kWidth

template <class Compute>
struct Scratch {
    typedef typename Compute::Word Word;
    Word* keys;     // (steps, kDecodeTile): k^T of a tile
    Word* values;   // (steps over kDecodeTile, stride)
    float* scores;  // (kRows, kDecodeTile)
    Word* weights;  // (kRows, kDecodeTile in words)
    Word* queries;  // (kv heads, rows, left_stride)
    float* totals;  // (kv heads, rows, kWidth): the denominators, their lanes not yet added up
    size_t bytes;

    Scratch(void* block, int64_t kv_heads, int64_t rows, const Sizes<Compute>& sizes) {
        Cutter cutter(block);
        keys = cutter.take<Word>(sizes.steps * lynx::kDecodeTile);
        values = cutter.take<Word>(sizes.steps_over(lynx::kDecodeTile) * sizes.stride);
        scores = cutter.take<float>(kRows * lynx::kDecodeTile);
        // fp32 weights take the place of their scores
        weights = Compute::kNumbers == 1 ? reinterpret_cast<Word*>(scores)
                                         : cutter.take<Word>(kRows * lynx::kDecodeTile / Compute::kNumbers);
        queries = cutter.take<Word>(kv_heads * rows * sizes.left_stride);
        totals = cutter.take<float>(kv_heads * rows * kWidth);
        bytes = cutter.used();
    }
};

inline int64_t rows_of(const DecodeProblem& problem, const Segment& segment) {
    return segment.num_branches * problem.rows_of_branch();
}

// One head's keys and values of a tile.
template <class Element>
struct Tile {
    Rows<Element> k, v;

    LYNX_INLINE Tile(const DecodeProblem& problem, const Part& part, int64_t key, int64_t head) {
        const int64_t keys = smaller(lynx::kDecodeTile, part.last_key - key);
        const lynx::Segment& from = *part.segment;
        k = {head_of<Element>(from.k, key, head), from.k.row_stride, keys, problem.head_dim};
        v = {head_of<Element>(from.v, key, head), from.v.row_stride, keys, problem.head_dim};
    }
};

// Ask for some of the rows, which will be read soon.
template <class Element>
LYNX_INLINE void ask_for(const Rows<Element>& rows) {
    const int64_t row_bytes = rows.dim * static_cast<int64_t>(sizeof(Element));
    for (int64_t row = 0; row < rows.count; row++)
        for (int64_t byte = 0; byte < row_bytes; byte += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(rows.first + row * rows.stride) + byte, 0, 2);
}

// The queries of all rows as left operand.
template <class Compute, class Element>
void pack_queries(const DecodeProblem& problem, const Segment& segment, int64_t kv_head, int64_t left_stride,
                  typename Compute::Word* to) {
    const int64_t group_heads = problem.num_heads / problem.num_kv_heads;
    const lynx::Matrix& q = problem.q.first;
    for (int64_t i = 0; i < segment.num_branches; i++) {
        const int64_t branch = segment.branches[i] * problem.q.stride;
        for (int64_t query = 0; query < problem.num_queries; query++) {
            const Element* first = head_of<Element>(q, query, kv_head * group_heads) + branch;
            pack_left<Compute>(Rows<Element>{first, q.head_stride, group_heads, problem.head_dim}, to, left_stride);
            to += group_heads * left_stride;
        }
    }
}

// One tile's part of a head's results, which stand from `result` on. `scratch` has the head's queries and totals.
template <class Compute, class Element>
void attend_to_tile(const DecodeProblem& problem, const Segment& segment, int64_t first_key, const Tile<Element>& tile,
                    const Tile<Element>& next, const Scratch<Compute>& scratch, const Sizes<Compute>& sizes,
                    int64_t result) {
    typedef typename Compute::Word Word;
    const int64_t dim = problem.head_dim, keys = tile.k.count, rows = rows_of(problem, segment);
    const int64_t group_heads = problem.num_heads / problem.num_kv_heads;
    const int64_t weights_stride = lynx::kDecodeTile / Compute::kNumbers;
    for (int64_t key = 0; key < keys; key += kStep) {
        ask_for(next.k.part(key, kStep));
        pack_transposed<Compute>(tile.k.part(key, kStep), scratch.keys + key, lynx::kDecodeTile);
    }
    const Word* values = scratch.values;
    int64_t values_stride = sizes.stride;
    // A single register tile of rows reads fp32 values once: where they stand, if that is in whole vectors.
    if (sizeof(Element) == sizeof(Word) && Compute::kNumbers == 1 && dim % kWidth == 0 && rows <= kTileRows) {
        values = reinterpret_cast<const Word*>(tile.v.first);
        values_stride = tile.v.stride;
    } else {
        pack_right<Compute>(tile.v, scratch.values, sizes.stride);
    }
    for (int64_t row = 0; row < rows; row += kRows) {
        const int64_t count = smaller(kRows, rows - row);
        float* sums = problem.sums + (result + row) * problem.sum_stride;
        multiply<Compute, false>(count, keys,
                                 {scratch.queries + row * sizes.left_stride, sizes.left_stride, scratch.keys,
                                  lynx::kDecodeTile, scratch.scores, lynx::kDecodeTile, sizes.steps, false});
        for (int64_t i = 0; i < count; i++) {
            // Of a branch's keys, its older queries see all but the newest.
            const int64_t newer = segment.is_causal ? problem.num_queries - 1 - (row + i) / group_heads : 0;
            const int64_t seen = segment.num_keys - newer - first_key;
            weigh<Compute>(scratch.scores + i * lynx::kDecodeTile, scratch.weights + i * weights_stride,
                           seen < 0 ? 0 : smaller(seen, keys), keys, problem.scale, problem.maxima[result + row + i],
                           scratch.totals + (row + i) * kWidth, sums + i * problem.sum_stride, dim);
        }
        for (int64_t key = 0; key < keys; key += kStep) {
            if (row == 0) ask_for(next.v.part(key, kStep));
            multiply<Compute, false>(
                count, dim,
                Product<Word>{scratch.weights + key / Compute::kNumbers, weights_stride,
                              values + key / Compute::kNumbers * values_stride, values_stride, sums, problem.sum_stride,
                              sizes.steps_over(smaller(kStep, keys - key)), true});
        }
    }
}

template <class Compute, class Element>
void attend(const DecodeProblem& problem, const Part& part, int64_t first_kv_head, int64_t last_kv_head, void* block) {
    const Segment& segment = *part.segment;
    const int64_t rows = rows_of(problem, segment), heads = last_kv_head - first_kv_head;
    const Sizes<Compute> sizes(problem.head_dim);
    const Scratch<Compute> scratch(block, heads, rows, sizes);
    const int64_t first_result =
        segment.first_result + (part.number * problem.num_kv_heads + first_kv_head) * rows;
    const int64_t results = heads * rows;
    memset(problem.sums + first_result * problem.sum_stride, 0, results * problem.sum_stride * sizeof(float));
    memset(scratch.totals, 0, results * kWidth * sizeof(float));
    for (int64_t i = 0; i < results; i++) problem.maxima[first_result + i] = -__builtin_inff();
    for (int64_t head = 0; head < heads; head++)
        pack_queries<Compute, Element>(problem, segment, first_kv_head + head, sizes.left_stride,
                                       scratch.queries + head * rows * sizes.left_stride);
    for (int64_t key = part.first_key; key < part.last_key; key += lynx::kDecodeTile)
        for (int64_t head = 0; head < heads; head++) {
            const bool is_last = head + 1 == heads;
            const int64_t next_key = smaller(is_last ? key + lynx::kDecodeTile : key, part.last_key);
            const Tile<Element> tile(problem, part, key, first_kv_head + head);
            const Tile<Element> next(problem, part, next_key, is_last ? first_kv_head : first_kv_head + head + 1);
            Scratch<Compute> of_head = scratch;
            of_head.queries += head * rows * sizes.left_stride;
            of_head.totals += head * rows * kWidth;
            attend_to_tile(problem, segment, key, tile, next, of_head, sizes, first_result + head * rows);
        }
    for (int64_t i = 0; i < results; i++)
        problem.totals[first_result + i] = sum_of_lanes(load(scratch.totals + i * kWidth));
}

// The results of all parts that one row reads: their numbers, at most so many.
struct Results {
    int64_t numbers[2 * lynx::kMostParts];
    int64_t count;

    LYNX_INLINE void add(const DecodeProblem& problem, const Segment& segment, int64_t kv_head, int64_t row) {
        const int64_t rows = rows_of(problem, segment);
        for (int64_t part = 0; part < segment.num_parts; part++)
            numbers[count++] = segment.first_result + (part * problem.num_kv_heads + kv_head) * rows + row;
    }
};

// Sums and totals of different maxima become those of the largest; their quotient is the output.
template <class Element>
void merge_row(const DecodeProblem& problem, const Results& results, Element* out, float* lse) {
    float maximum = -__builtin_inff(), total = 0, factors[2 * lynx::kMostParts];
    for (int64_t i = 0; i < results.count; i++) {
        const float other = problem.maxima[results.numbers[i]];
        maximum = other > maximum ? other : maximum;
    }
    for (int64_t i = 0; i < results.count; i++) {
        factors[i] = exp(broadcast(problem.maxima[results.numbers[i]] - maximum))[0];
        total += factors[i] * problem.totals[results.numbers[i]];
    }
    for (int64_t column = 0; column < problem.head_dim; column += kWidth) {
        Floats sum = {};
        for (int64_t i = 0; i < results.count; i++)
            sum += factors[i] * load(problem.sums + results.numbers[i] * problem.sum_stride + column);
        store_first(out + column, sum / total, problem.head_dim - column);
    }
    *lse = total == total ? maximum + log(broadcast(total))[0] : total;
}

template <class Element>
void merge(const DecodeProblem& problem, int64_t branch) {
    const lynx::Sources& sources = problem.sources[branch];
    const int64_t group_heads = problem.num_heads / problem.num_kv_heads, rows = problem.rows_of_branch();
    for (int64_t query = 0; query < problem.num_queries; query++)
        for (int64_t head = 0; head < problem.num_heads; head++) {
            const int64_t row = query * group_heads + head % group_heads, kv_head = head / group_heads;
            const int64_t index = (branch * problem.num_queries + query) * problem.num_heads + head;
            Results results = {};
            results.add(problem, *sources.root, kv_head, sources.place_in_root * rows + row);
            results.add(problem, *sources.own, kv_head, row);
            merge_row(problem, results, static_cast<Element*>(problem.out) + index * problem.head_dim,
                      problem.lse + index);
        }
}

size_t any_scratch_bytes(const DecodeProblem& problem, const Segment& segment) {
    const int64_t rows = rows_of(problem, segment), dim = problem.head_dim;
    const int64_t heads = problem.num_kv_heads;
    return problem.is_bfloat16 ? Scratch<BFloat16Compute>(nullptr, heads, rows, Sizes<BFloat16Compute>(dim)).bytes
                               : Scratch<Single>(nullptr, heads, rows, Sizes<Single>(dim)).bytes;
}

void any_attend(const DecodeProblem& problem, const Part& part, int64_t first_kv_head, int64_t last_kv_head,
                void* scratch) {
    if (problem.is_bfloat16)
        attend<BFloat16Compute, BFloat16>(problem, part, first_kv_head, last_kv_head, scratch);
    else
        attend<Single, float>(problem, part, first_kv_head, last_kv_head, scratch);
}

void any_merge(const DecodeProblem& problem, int64_t branch) {
    if (problem.is_bfloat16)
        merge<BFloat16>(problem, branch);
    else
        merge<float>(problem, branch);
}

}  // namespace

namespace lynx {

extern const DecodeKernels LYNX_KERNELS = {any_scratch_bytes, any_attend, any_merge};

}  // namespace lynx
