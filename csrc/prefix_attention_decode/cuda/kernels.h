// prefix_attention_decode as two CUDA kernels: attention to splits of the keys, and the combination of the splits.
// Shapes: B branches of Q queries and P ranges of K shared keys, H query heads, Hkv key heads, D numbers in a head.
//
// Reading keys and values bounds the time. A block gets a split of the keys of one range or one branch, of one key head,
// and up to kBlockM rows. Rows are the queries of all heads that share the key head, of one branch, or over a range of
// several branches that read it in the same place. So it is read once for all of them that fit into a block. Nothing
// behind the lengths is read.
#pragma once

#include <cassert>
#include <cmath>

#include "common/loads.h"
#include "common/phases.h"

namespace lynx::decode {

// Integers on the device, int32 or int64. One that an int cannot hold becomes the largest int, which is out of range
// too.
struct Indices {
    const void* data;
    bool is_long;

    LYNX_PORTABLE int operator[](int i) const {
        if (!is_long) return static_cast<const int32_t*>(data)[i];
        const int64_t value = static_cast<const int64_t*>(data)[i];
        return value == static_cast<int>(value) ? static_cast<int>(value) : 0x7fffffff;
    }
};

// (B, capacity, Hkv, D). Strides are those of the first three dimensions, in elements. Shared keys (K, Hkv, D) are
// written as (K, K, Hkv, D), with the same stride twice: an entry for every key that a range may start at.
struct Cache {
    const void* data;
    int64_t strides[3];
};

struct Problem {
    Values q;  // (B, Q, H, D), contiguous
    Cache shared_k, shared_v, branch_k, branch_v;
    Indices ranges, branch_lengths;  // (B, P, 2) and (B,)
    int branches, queries, ranges_of_branch, heads, kv_heads, dim;
    int num_shared, branch_capacity;
    float scale;                     // of the scores, times log2(e)
    int m_tiles;                     // of one branch: more than one only if its rows fill a tile
    int tile_branches;                // branches of a range in one tile
    int range_splits, branch_splits;  // of one range, and of a branch's own keys; they do not depend on the lengths
    float* outs;                     // (splits, B, Q, H, D)
    float* lses;                     // (splits, B, Q, H)
};

// What a block computes.
struct Work {
    int branch, m_tile, kv_head, split;
    bool is_shared;
    int range;                // the number of the range, where the keys are shared
    int entry;                // of the cache: the range's start, or the branch
    int first_key, num_keys;  // of the split; num_keys is negative if other splits have all keys
    int length;               // keys of the range or the branch
};

// Start or end of a branch's range.
LYNX_PORTABLE int bound_of(const Problem& problem, int branch, int range, int side) {
    return problem.ranges[(branch * problem.ranges_of_branch + range) * 2 + side];
}

LYNX_PORTABLE Work work_of(const Problem& problem, int block, int block_n) {
    Work work;
    work.m_tile = block % problem.m_tiles;
    work.branch = block / problem.m_tiles % problem.branches;
    const int rest = block / problem.m_tiles / problem.branches;
    work.kv_head = rest % problem.kv_heads;
    work.split = rest / problem.kv_heads;
    const int shared_splits = problem.ranges_of_branch * problem.range_splits;
    work.is_shared = work.split < shared_splits;
    const int num_splits = work.is_shared ? problem.range_splits : problem.branch_splits;
    const int index = (work.is_shared ? work.split : work.split - shared_splits) % num_splits;
    work.range = work.split / num_splits;
    if (work.is_shared) {
        work.entry = bound_of(problem, work.branch, work.range, 0);
        const int end = bound_of(problem, work.branch, work.range, 1);
        assert(0 <= work.entry && work.entry <= end && end <= problem.num_shared &&
               "prefix_attention_decode: a range is not within the shared keys");
        work.length = end - work.entry;
    } else {
        work.entry = work.branch;
        work.length = problem.branch_lengths[work.branch];
        assert(0 <= work.length && "prefix_attention_decode: a length is negative");
        assert(work.length <= problem.branch_capacity && "prefix_attention_decode: a length exceeds the cache");
    }
    const int tiles = (work.length + block_n - 1) / block_n, each = (tiles + num_splits - 1) / num_splits * block_n;
    work.first_key = index * each;
    work.num_keys = each < work.length - work.first_key ? each : work.length - work.first_key;
    return work;
}

// Whether a branch reads the same range in the same place.
LYNX_PORTABLE bool reads(const Problem& problem, const Work& work, int branch) {
    return bound_of(problem, branch, work.range, 0) == work.entry &&
           bound_of(problem, branch, work.range, 1) == work.entry + work.length;
}

// The readers of the range that stand before this branch. Of every tile_branches readers, the block of the first one
// computes all.
LYNX_PORTABLE int readers_before(const Problem& problem, const Work& work) {
    int before = 0;
    for (int i = 0; i < work.branch; i++) before += reads(problem, work, i);
    return before;
}

LYNX_GLOBAL(prefix_attention_decode_fwd_kernel)
template <class Element, int kDim, int kM>
struct Attend {
    LYNX_RUN_BY(prefix_attention_decode_fwd_kernel, Attend)
    static constexpr int kBlockM = kM;
    static constexpr int kItems = 16 / sizeof(Element);                                        // of a load
    static constexpr int kThreads = 128, kLanes = kDim / kItems, kGroups = kThreads / kLanes;  // lanes share a key
    // The keys that a thread computes at once. Keys and values are loaded one tile ahead: 8 loads of 128 threads are 16
    // KB, so four blocks have 64 KB in flight. An H200 moves 36 bytes/ns to a multiprocessor, so 29 KB in the 0.8 us
    // that a load takes (an estimate).
    static constexpr int kThreadKeys = 4;
    static constexpr int kBlockN = kThreadKeys * kGroups;
    static constexpr int kBlocks = kBlockM == 8 ? 3 : 4;
    static constexpr int kPhases = 8;
    static constexpr int kScores = kBlockM * kBlockN, kOwnScores = (kScores + kThreads - 1) / kThreads;
    static constexpr int kPartialStride = kLanes + 4;  // 16-byte reads of neighbouring threads use different banks
    static constexpr int kAccFloats = kGroups * kBlockM * kDim, kPartialFloats = kScores * kPartialStride;

    using Args = Problem;
    struct alignas(16) Shared {
        // The lanes' partial sums of each score, (kScores, kPartialStride). At the end the groups' partial sums of the
        // output, (kGroups, kBlockM, kDim).
        float floats[kAccFloats > kPartialFloats ? kAccFloats : kPartialFloats];
        float queries[kBlockM][kDim];
        float scores[kBlockM][kBlockN];
        float p[kBlockN][kBlockM];
        float factors[kBlockM], row_max[kBlockM];
        float row_sum[kGroups][kBlockM];
        int branches[kBlockM];  // of the tile; -1 if there is none
    };
    struct Registers {
        Work work;  // from the first phase on
        Bytes16 keys[kThreadKeys], values[kThreadKeys];
        float acc[kBlockM][kItems];
        float row_sum[kBlockM];
        float row_max[kOwnScores];  // of the rows of the thread's own scores
    };

    LYNX_PORTABLE static int rounds(const Args& args, int block) {
        const Work work = work_of(args, block, kBlockN);
        if (work.is_shared && readers_before(args, work) % args.tile_branches != 0) return 1;
        return work.num_keys <= kBlockN ? 1 : (work.num_keys - 1) / kBlockN + 1;
    }

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared& shared, Registers& registers) {
        if constexpr (kPhase == 0) {
            if (place.round > 0) return;
            registers.work = work_of(args, place.block, kBlockN);
            if (place.thread < kBlockM) find_branch(args, registers.work, place.thread, shared);
        } else {
            const Work& work = registers.work;
            const bool is_last = (place.round + 1) * kBlockN >= work.num_keys;
            if (shared.branches[0] < 0) return;  // another block computes this branch
            if constexpr (kPhase == 1) {
                if (place.round > 0) return;
                prefetch<true>(args, work, 0, place.thread, registers.keys);
                prefetch<false>(args, work, 0, place.thread, registers.values);
                store_queries(args, work, place.thread, shared);
            } else if constexpr (kPhase == 2) {
                multiply_keys(place.thread, registers, shared);
                prefetch<true>(args, work, place.round + 1, place.thread, registers.keys);
            } else if constexpr (kPhase == 3) {
                store_scores(args, work, place, shared);
            } else if constexpr (kPhase == 4) {
                online_softmax(place, registers, shared);
            } else if constexpr (kPhase == 5) {
                add_values(place.thread, registers, shared);
                prefetch<false>(args, work, place.round + 1, place.thread, registers.values);
            } else if constexpr (kPhase == 6) {
                if (is_last) store_partial_sums(place.thread, registers, shared);
            } else {
                if (is_last) write(args, work, place.thread, shared);
            }
        }
    }

   private:
    // A row of a tile.
    struct Row {
        int branch, query, head;
        bool is_valid;
        LYNX_PORTABLE int64_t index(const Args& args) const {
            return (static_cast<int64_t>(branch) * args.queries + query) * args.heads + head;
        }
    };

    LYNX_PORTABLE static Row row_of(const Args& args, const Work& work, int in_tile, const Shared& shared) {
        const int shared_heads = args.heads / args.kv_heads, rows = args.queries * shared_heads;
        const int number = work.m_tile * kBlockM + in_tile, place_in_tile = number / rows, in_branch = number % rows;
        const int branch = shared.branches[place_in_tile];
        return {branch, in_branch / shared_heads, work.kv_head * shared_heads + in_branch % shared_heads, branch >= 0};
    }

    // Only one branch sees a branch's own keys. Over a range, each thread looks for one branch of the tile, among all B,
    // which are tens.
    LYNX_PORTABLE static void find_branch(const Args& args, const Work& work, int place_in_tile, Shared& shared) {
        shared.branches[place_in_tile] = place_in_tile == 0 ? work.branch : -1;
        if (!work.is_shared) return;
        if (readers_before(args, work) % args.tile_branches != 0) {
            shared.branches[place_in_tile] = -1;
            return;
        }
        int found = 0;
        for (int i = work.branch; i < args.branches && found <= place_in_tile && place_in_tile < args.tile_branches;
             i++)
            if (reads(args, work, i) && found++ == place_in_tile) shared.branches[place_in_tile] = i;
    }

    // Keys and values that do not exist become zeros.
    template <bool kIsKey>
    LYNX_PORTABLE static void prefetch(const Args& args, const Work& work, int round, int thread,
                                       Bytes16 (&loads)[kThreadKeys]) {
        const Cache& cache =
            kIsKey ? (work.is_shared ? args.shared_k : args.branch_k) : (work.is_shared ? args.shared_v : args.branch_v);
        const int column = thread % kLanes * kItems;
        const Element* from = static_cast<const Element*>(cache.data) +
                              work.entry * cache.strides[0] + work.kv_head * cache.strides[2] + column;
        int key = round * kBlockN + thread / kLanes;
        from += (work.first_key + key) * cache.strides[1];
        LYNX_UNROLL
        for (int i = 0; i < kThreadKeys; i++) {
            loads[i] = load16_streaming(from, key < work.num_keys && column < args.dim);
            key += kGroups;
            from += kGroups * cache.strides[1];
        }
    }

    LYNX_PORTABLE static void store_queries(const Args& args, const Work& work, int thread, Shared& shared) {
        LYNX_UNROLL_BY(1)
        for (int i = thread; i < kBlockM * kLanes; i += kThreads) {
            const int in_tile = i / kLanes, column = i % kLanes * kItems;
            const Row row = row_of(args, work, in_tile, shared);
            float values[kItems] = {};
            if (row.is_valid) {
                const auto raw = fetch<kItems>(args.q, row.index(args) * args.dim + column, args.dim - column);
                widen(raw, args.q.dtype, values);
            }
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) shared.queries[in_tile][column + item] = values[item];
        }
    }

    LYNX_PORTABLE static void multiply_keys(int thread, const Registers& registers, Shared& shared) {
        const int lane = thread % kLanes, group = thread / kLanes;
        float keys[kThreadKeys][kItems];
        LYNX_UNROLL
        for (int i = 0; i < kThreadKeys; i++) {
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) keys[i][item] = item_of<Element>(registers.keys[i], item);
        }
        LYNX_UNROLL_BY(1)  // unrolled, it would read the queries of all rows ahead, and lack registers
        for (int row = 0; row < kBlockM; row++) {
            const auto query = load<float, kItems>(shared.queries[row] + lane * kItems);
            LYNX_UNROLL
            for (int i = 0; i < kThreadKeys; i++) {
                float sum = 0;
                LYNX_UNROLL
                for (int item = 0; item < kItems; item++) sum += query.items[item] * keys[i][item];
                shared.floats[(row * kBlockN + i * kGroups + group) * kPartialStride + lane] = sum;
            }
        }
    }

    // A query does not see the keys of its branch that are newer than its own: query i of Q not the last Q - 1 - i. A
    // split ends at the end of a tile, or of all keys.
    LYNX_PORTABLE static void store_scores(const Args& args, const Work& work, const Place& place, Shared& shared) {
        LYNX_UNROLL_BY(1)
        for (int i = 0; i < kOwnScores; i++) {
            const int number = place.thread + i * kThreads, row = number / kBlockN, key = number % kBlockN;
            if (number >= kScores) continue;
            float sums[4] = {};
            LYNX_UNROLL
            for (int lane = 0; lane < kLanes; lane += 4) {
                const auto partial = load<float, 4>(shared.floats + number * kPartialStride + lane);
                LYNX_UNROLL
                for (int item = 0; item < 4; item++) sums[item] += partial.items[item];
            }
            const int position = work.first_key + place.round * kBlockN + key;
            const int newer = work.is_shared ? 0 : args.queries - 1 - row_of(args, work, row, shared).query;
            const bool is_seen = position < work.length - newer;
            shared.scores[row][key] = is_seen ? ((sums[0] + sums[1]) + (sums[2] + sums[3])) * args.scale : -INFINITY;
        }
    }

    // Weights relative to the largest score so far, and the factor that rescales earlier sums.
    LYNX_PORTABLE static void online_softmax(const Place& place, Registers& registers, Shared& shared) {
        LYNX_UNROLL
        for (int i = 0; i < kOwnScores; i++) {
            const int number = place.thread + i * kThreads, row = number / kBlockN, key = number % kBlockN;
            if (number >= kScores) continue;
            const float before = place.round == 0 ? -INFINITY : registers.row_max[i];
            float maximum = before;
            LYNX_UNROLL_BY(2)
            for (int other = 0; other < kBlockN; other += 4) {
                const auto scores = load<float, 4>(shared.scores[row] + other);
                LYNX_UNROLL
                for (int item = 0; item < 4; item++)
                    if (scores.items[item] > maximum) maximum = scores.items[item];
            }
            registers.row_max[i] = maximum;
            const float finite = maximum == -INFINITY ? 0 : maximum;  // no key is seen yet
            shared.p[key][row] = exp2f(shared.scores[row][key] - finite);
            if (key > 0) continue;
            shared.factors[row] = exp2f(before - finite);
            shared.row_max[row] = maximum;
        }
    }

    LYNX_PORTABLE static void add_values(int thread, Registers& registers, const Shared& shared) {
        LYNX_UNROLL
        for (int row = 0; row < kBlockM; row++) {
            const float factor = shared.factors[row];
            registers.row_sum[row] *= factor;
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) registers.acc[row][item] *= factor;
        }
        LYNX_UNROLL
        for (int i = 0; i < kThreadKeys; i++) {
            const auto p = load<float, kBlockM>(shared.p[i * kGroups + thread / kLanes]);
            float values[kItems];
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) values[item] = item_of<Element>(registers.values[i], item);
            LYNX_UNROLL
            for (int row = 0; row < kBlockM; row++) {
                registers.row_sum[row] += p.items[row];
                LYNX_UNROLL
                for (int item = 0; item < kItems; item++) registers.acc[row][item] += p.items[row] * values[item];
            }
        }
    }

    LYNX_PORTABLE static void store_partial_sums(int thread, const Registers& registers, Shared& shared) {
        const int lane = thread % kLanes, group = thread / kLanes;
        LYNX_UNROLL
        for (int row = 0; row < kBlockM; row++) {
            if (lane == 0) shared.row_sum[group][row] = registers.row_sum[row];
            AlignedVector<float, kItems> acc;
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) acc.items[item] = registers.acc[row][item];
            store(shared.floats + (group * kBlockM + row) * kDim + lane * kItems, acc);
        }
    }

    // A split without keys gives 0 and the LSE -inf, whose weight is 0.
    LYNX_PORTABLE static void write(const Args& args, const Work& work, int thread, const Shared& shared) {
        constexpr int kQuads = kDim / 4;
        LYNX_UNROLL_BY(1)
        for (int i = thread; i < kBlockM * kQuads; i += kThreads) {
            const int in_tile = i / kQuads, column = i % kQuads * 4;
            const Row row = row_of(args, work, in_tile, shared);
            if (!row.is_valid || column >= args.dim) continue;
            AlignedVector<float, 4> acc = {};
            float denominator = 0;
            LYNX_UNROLL
            for (int group = 0; group < kGroups; group++) {
                const auto partial = load<float, 4>(shared.floats + (group * kBlockM + in_tile) * kDim + column);
                denominator += shared.row_sum[group][in_tile];
                LYNX_UNROLL
                for (int item = 0; item < 4; item++) acc.items[item] += partial.items[item];
            }
            LYNX_UNROLL
            for (int item = 0; item < 4; item++) acc.items[item] /= denominator == 0 ? 1 : denominator;
            const int64_t rows = static_cast<int64_t>(args.branches) * args.queries * args.heads;
            const int64_t to = work.split * rows + row.index(args);
            store(args.outs + to * args.dim + column, acc);
            if (column == 0) args.lses[to] = (shared.row_max[in_tile] + log2f(denominator)) * 0.69314718f;
        }
    }
};

// The result over all keys from those over the splits: their outputs, weighted by exp(LSE of the split - LSE).
LYNX_GLOBAL(prefix_attention_decode_fwd_combine_kernel)
struct Combine : OnePhase {
    LYNX_RUN_BY(prefix_attention_decode_fwd_combine_kernel, Combine)
    static constexpr int kThreads = 128, kItems = 4;

    struct Args {
        const float* outs;  // (splits, rows, D)
        const float* lses;  // (splits, rows)
        void* out;          // (rows, D)
        Dtype dtype;
        float* lse;  // (rows,)
        int num_splits, dim;
        int64_t rows;
    };

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared&, Registers&) {
        const int64_t number = static_cast<int64_t>(place.block) * kThreads + place.thread;
        const int64_t row = number / (args.dim / kItems);
        const int column = static_cast<int>(number % (args.dim / kItems)) * kItems;
        if (row >= args.rows) return;
        float maximum = -INFINITY;
        for (int split = 0; split < args.num_splits; split++) {
            const float lse = args.lses[split * args.rows + row];
            if (lse > maximum) maximum = lse;
        }
        const float finite = maximum == -INFINITY ? 0 : maximum;  // no split has a key
        float denominator = 0, acc[kItems] = {};
        for (int split = 0; split < args.num_splits; split++) {
            const int64_t from = split * args.rows + row;
            const float weight = expf(args.lses[from] - finite);
            const auto out = load<float, kItems>(args.outs + from * args.dim + column);
            denominator += weight;
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) acc[item] += weight * out.items[item];
        }
        LYNX_UNROLL
        for (int item = 0; item < kItems; item++)
            store_one(args.out, args.dtype, row * args.dim + column + item,
                      acc[item] / (denominator == 0 ? 1 : denominator));
        if (column == 0) args.lse[row] = finite + logf(denominator);
    }
};

}  // namespace lynx::decode
