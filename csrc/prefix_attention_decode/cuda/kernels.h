// prefix_attention_decode as CUDA kernels: attention to parts of the keys, then what the parts amount to. Shapes: B
// branches of Q queries, R roots, H heads of which H / Hkv share a head of keys, D numbers a head.
//
// Reading keys and values bounds the time. A block is given a part of the keys of one root or one branch, one head of
// them, and up to kTileRows rows: the queries, of the heads that share it, of one branch or, over a root, of several. So
// a root's keys are read once for all of its branches that fit. What lies behind the lengths is never read.
#pragma once

#include <cassert>
#include <cmath>

#include "common/packs.h"
#include "common/phases.h"

namespace lynx::decode {

// Whole numbers of either size, on the device. One that does not fit into 31 bits is the largest that does, out of range
// as well.
struct Indices {
    const void* data;
    bool is_long;

    LYNX_PORTABLE int operator[](int i) const {
        if (!is_long) return static_cast<const int32_t*>(data)[i];
        const int64_t value = static_cast<const int64_t*>(data)[i];
        return value == static_cast<int>(value) ? static_cast<int>(value) : 0x7fffffff;
    }
};

// (R or B, capacity, Hkv, D); strides of the first three dimensions, in elements.
struct Cache {
    const void* data;
    int64_t strides[3];
};

struct Problem {
    Values q;  // (B, Q, H, D), contiguous
    Cache root_k, root_v, branch_k, branch_v;
    Indices branch_to_root, root_lengths, branch_lengths;
    int branches, queries, heads, kv_heads, dim;
    int roots, root_capacity, branch_capacity;
    float scale;                   // of the scores as powers of 2
    int row_tiles;                 // of one branch: more than one only where its rows fill a tile
    int slots;                     // branches of a root in a tile
    int root_parts, branch_parts;  // how the keys are cut, whatever the lengths
    float* outs;                   // (parts, B, Q, H, D)
    float* lses;                   // (parts, B, Q, H)
};

// Where a block stands.
struct Work {
    int branch, row_tile, kv_head, part;
    bool is_root;
    int root;                 // of the branch
    int first_key, num_keys;  // of the part; less than 0 where others have all keys
    int length;               // keys of the root or the branch
};

LYNX_PORTABLE Work work_of(const Problem& problem, int block, int chunk) {
    Work work;
    work.row_tile = block % problem.row_tiles;
    work.branch = block / problem.row_tiles % problem.branches;
    const int rest = block / problem.row_tiles / problem.branches;
    work.kv_head = rest % problem.kv_heads;
    work.part = rest / problem.kv_heads;
    work.is_root = work.part < problem.root_parts;
    work.root = problem.branch_to_root[work.branch];
    assert(0 <= work.root && work.root < problem.roots && "prefix_attention_decode: a root is out of range");
    work.length = work.is_root ? problem.root_lengths[work.root] : problem.branch_lengths[work.branch];
    assert(0 <= work.length && "prefix_attention_decode: a length is negative");
    assert(work.length <= (work.is_root ? problem.root_capacity : problem.branch_capacity) &&
           "prefix_attention_decode: a length exceeds the cache");
    const int parts = work.is_root ? problem.root_parts : problem.branch_parts;
    const int index = work.is_root ? work.part : work.part - problem.root_parts;
    const int chunks = (work.length + chunk - 1) / chunk, each = (chunks + parts - 1) / parts * chunk;
    work.first_key = index * each;
    work.num_keys = each < work.length - work.first_key ? each : work.length - work.first_key;
    return work;
}

// Branches of the same root that stand before. Every `slots` of them the next one's block works for as many.
LYNX_PORTABLE int branches_before(const Problem& problem, const Work& work) {
    int before = 0;
    for (int i = 0; i < work.branch; i++) before += problem.branch_to_root[i] == work.root;
    return before;
}

template <class Element, int kDim, int kTileRows>
struct Attend {
    static constexpr int kItems = 16 / sizeof(Element);                       // a load
    static constexpr int kThreads = 128, kLanes = kDim / kItems, kGroups = kThreads / kLanes;  // lanes share a key
    // Keys of a thread at once. Keys and values are asked for a chunk ahead of each other: 8 loads of 128 threads are 16
    // KB, of which four blocks keep 64 on their way. An H200 moves 36 bytes a ns to a multiprocessor: in the 0.8 us that
    // they take to come, 29 KB.
    static constexpr int kKeys = 4;
    static constexpr int kChunk = kKeys * kGroups;
    static constexpr int kBlocks = kTileRows == 8 ? 3 : 4;
    static constexpr int kPhases = 8;
    static constexpr int kScores = kTileRows * kChunk, kOwnScores = (kScores + kThreads - 1) / kThreads;
    static constexpr int kPartStride = kLanes + 4;  // so that 16-byte reads of neighbours meet different banks
    static constexpr int kSumFloats = kGroups * kTileRows * kDim, kPartFloats = kScores * kPartStride;

    using Args = Problem;
    struct alignas(16) Shared {
        // What lanes have of each score, (kScores, kPartStride); at the end what groups have of each sum, (kGroups,
        // kTileRows, kDim).
        float floats[kSumFloats > kPartFloats ? kSumFloats : kPartFloats];
        float queries[kTileRows][kDim];
        float scores[kTileRows][kChunk];
        float weights[kChunk][kTileRows];
        float factors[kTileRows], maxima[kTileRows];
        float denominators[kGroups][kTileRows];
        int branches[kTileRows];  // by slot; -1 where there is none
    };
    struct Registers {
        Work work;  // from the first phase on
        Words keys[kKeys], values[kKeys];
        float sums[kTileRows][kItems];
        float denominators[kTileRows];
        float maxima[kOwnScores];  // of the rows whose scores are this thread's
    };

    LYNX_PORTABLE static int rounds(const Args& args, int block) {
        const Work work = work_of(args, block, kChunk);
        if (work.is_root && branches_before(args, work) % args.slots != 0) return 1;
        return work.num_keys <= kChunk ? 1 : (work.num_keys - 1) / kChunk + 1;
    }

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared& shared, Registers& registers) {
        if constexpr (kPhase == 0) {
            if (place.round > 0) return;
            registers.work = work_of(args, place.block, kChunk);
            if (place.thread < kTileRows) find_branch(args, registers.work, place.thread, shared);
        } else {
            const Work& work = registers.work;
            const bool is_last = (place.round + 1) * kChunk >= work.num_keys;
            if (shared.branches[0] < 0) return;  // another block works for this one's branch
            if constexpr (kPhase == 1) {
                if (place.round > 0) return;
                ask<true>(args, work, 0, place.thread, registers.keys);
                ask<false>(args, work, 0, place.thread, registers.values);
                leave_queries(args, work, place.thread, shared);
            } else if constexpr (kPhase == 2) {
                multiply_keys(place.thread, registers, shared);
                ask<true>(args, work, place.round + 1, place.thread, registers.keys);
            } else if constexpr (kPhase == 3) {
                leave_scores(args, work, place, shared);
            } else if constexpr (kPhase == 4) {
                leave_weights(place, registers, shared);
            } else if constexpr (kPhase == 5) {
                add_values(place.thread, registers, shared);
                ask<false>(args, work, place.round + 1, place.thread, registers.values);
            } else if constexpr (kPhase == 6) {
                if (is_last) leave_sums(place.thread, registers, shared);
            } else {
                if (is_last) write(args, work, place.thread, shared);
            }
        }
    }

   private:
    // A row of the tile.
    struct Row {
        int branch, query, head;
        bool is_there;
        LYNX_PORTABLE int64_t index(const Args& args) const {
            return (static_cast<int64_t>(branch) * args.queries + query) * args.heads + head;
        }
    };

    LYNX_PORTABLE static Row row_of(const Args& args, const Work& work, int in_tile, const Shared& shared) {
        const int shared_heads = args.heads / args.kv_heads, rows = args.queries * shared_heads;
        const int number = work.row_tile * kTileRows + in_tile, slot = number / rows, in_branch = number % rows;
        const int branch = shared.branches[slot];  // none behind the slots
        return {branch, in_branch / shared_heads, work.kv_head * shared_heads + in_branch % shared_heads, branch >= 0};
    }

    // Over its own keys a branch is alone. Threads look for the branch of a slot each, at all B of them: tens.
    LYNX_PORTABLE static void find_branch(const Args& args, const Work& work, int slot, Shared& shared) {
        shared.branches[slot] = slot == 0 ? work.branch : -1;
        if (!work.is_root) return;
        if (branches_before(args, work) % args.slots != 0) {
            shared.branches[slot] = -1;
            return;
        }
        int found = 0;
        for (int i = work.branch; i < args.branches && found <= slot && slot < args.slots; i++)
            if (args.branch_to_root[i] == work.root && found++ == slot) shared.branches[slot] = i;
    }

    // Zeros take the place of what is outside.
    template <bool kIsKey>
    LYNX_PORTABLE static void ask(const Args& args, const Work& work, int round, int thread,
                                  Words (&words)[kKeys]) {
        const Cache& cache =
            kIsKey ? (work.is_root ? args.root_k : args.branch_k) : (work.is_root ? args.root_v : args.branch_v);
        const int column = thread % kLanes * kItems;
        const Element* from = static_cast<const Element*>(cache.data) +
                              (work.is_root ? work.root : work.branch) * cache.strides[0] +
                              work.kv_head * cache.strides[2] + column;
        int key = round * kChunk + thread / kLanes;
        from += (work.first_key + key) * cache.strides[1];
        LYNX_UNROLL
        for (int i = 0; i < kKeys; i++) {
            words[i] = load_words_once(from, key < work.num_keys && column < args.dim);
            key += kGroups;
            from += kGroups * cache.strides[1];
        }
    }

    LYNX_PORTABLE static void leave_queries(const Args& args, const Work& work, int thread, Shared& shared) {
        LYNX_UNROLL_BY(1)
        for (int i = thread; i < kTileRows * kLanes; i += kThreads) {
            const int in_tile = i / kLanes, column = i % kLanes * kItems;
            const Row row = row_of(args, work, in_tile, shared);
            float values[kItems] = {};
            if (row.is_there) {
                const auto raw = fetch<kItems>(args.q, row.index(args) * args.dim + column, args.dim - column);
                widen(raw, args.q.dtype, values);
            }
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) shared.queries[in_tile][column + item] = values[item];
        }
    }

    LYNX_PORTABLE static void multiply_keys(int thread, const Registers& registers, Shared& shared) {
        const int lane = thread % kLanes, group = thread / kLanes;
        float keys[kKeys][kItems];
        LYNX_UNROLL
        for (int i = 0; i < kKeys; i++) {
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) keys[i][item] = item_of<Element>(registers.keys[i], item);
        }
        LYNX_UNROLL_BY(1)  // or reads of all rows' queries are moved ahead, for which there are no registers
        for (int row = 0; row < kTileRows; row++) {
            const auto query = load<float, kItems>(shared.queries[row] + lane * kItems);
            LYNX_UNROLL
            for (int i = 0; i < kKeys; i++) {
                float sum = 0;
                LYNX_UNROLL
                for (int item = 0; item < kItems; item++) sum += query.items[item] * keys[i][item];
                shared.floats[(row * kChunk + i * kGroups + group) * kPartStride + lane] = sum;
            }
        }
    }

    // A query misses the keys of its branch that are newer than its own: query i of Q the last Q - 1 - i. A part ends with
    // a chunk, or with all keys.
    LYNX_PORTABLE static void leave_scores(const Args& args, const Work& work, const Place& place, Shared& shared) {
        LYNX_UNROLL_BY(1)
        for (int i = 0; i < kOwnScores; i++) {
            const int number = place.thread + i * kThreads, row = number / kChunk, key = number % kChunk;
            if (number >= kScores) continue;
            float sums[4] = {};
            LYNX_UNROLL
            for (int lane = 0; lane < kLanes; lane += 4) {
                const auto parts = load<float, 4>(shared.floats + number * kPartStride + lane);
                LYNX_UNROLL
                for (int item = 0; item < 4; item++) sums[item] += parts.items[item];
            }
            const int position = work.first_key + place.round * kChunk + key;
            const int newer = work.is_root ? 0 : args.queries - 1 - row_of(args, work, row, shared).query;
            const bool is_seen = position < work.length - newer;
            shared.scores[row][key] = is_seen ? ((sums[0] + sums[1]) + (sums[2] + sums[3])) * args.scale : -INFINITY;
        }
    }

    // Weights relative to the largest score so far, and what that makes of those before.
    LYNX_PORTABLE static void leave_weights(const Place& place, Registers& registers, Shared& shared) {
        LYNX_UNROLL
        for (int i = 0; i < kOwnScores; i++) {
            const int number = place.thread + i * kThreads, row = number / kChunk, key = number % kChunk;
            if (number >= kScores) continue;
            const float before = place.round == 0 ? -INFINITY : registers.maxima[i];
            float maximum = before;
            LYNX_UNROLL_BY(2)
            for (int other = 0; other < kChunk; other += 4) {
                const auto scores = load<float, 4>(shared.scores[row] + other);
                LYNX_UNROLL
                for (int item = 0; item < 4; item++)
                    if (scores.items[item] > maximum) maximum = scores.items[item];
            }
            registers.maxima[i] = maximum;
            const float finite = maximum == -INFINITY ? 0 : maximum;  // no key is seen yet
            shared.weights[key][row] = exp2f(shared.scores[row][key] - finite);
            if (key > 0) continue;
            shared.factors[row] = exp2f(before - finite);
            shared.maxima[row] = maximum;
        }
    }

    LYNX_PORTABLE static void add_values(int thread, Registers& registers, const Shared& shared) {
        LYNX_UNROLL
        for (int row = 0; row < kTileRows; row++) {
            const float factor = shared.factors[row];
            registers.denominators[row] *= factor;
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) registers.sums[row][item] *= factor;
        }
        LYNX_UNROLL
        for (int i = 0; i < kKeys; i++) {
            const auto weights = load<float, kTileRows>(shared.weights[i * kGroups + thread / kLanes]);
            float values[kItems];
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) values[item] = item_of<Element>(registers.values[i], item);
            LYNX_UNROLL
            for (int row = 0; row < kTileRows; row++) {
                registers.denominators[row] += weights.items[row];
                LYNX_UNROLL
                for (int item = 0; item < kItems; item++)
                    registers.sums[row][item] += weights.items[row] * values[item];
            }
        }
    }

    LYNX_PORTABLE static void leave_sums(int thread, const Registers& registers, Shared& shared) {
        const int lane = thread % kLanes, group = thread / kLanes;
        LYNX_UNROLL
        for (int row = 0; row < kTileRows; row++) {
            if (lane == 0) shared.denominators[group][row] = registers.denominators[row];
            Pack<float, kItems> sums;
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) sums.items[item] = registers.sums[row][item];
            store(shared.floats + (group * kTileRows + row) * kDim + lane * kItems, sums);
        }
    }

    // A part without keys has 0 and -inf, which weigh nothing.
    LYNX_PORTABLE static void write(const Args& args, const Work& work, int thread, const Shared& shared) {
        constexpr int kQuads = kDim / 4;
        LYNX_UNROLL_BY(1)
        for (int i = thread; i < kTileRows * kQuads; i += kThreads) {
            const int in_tile = i / kQuads, column = i % kQuads * 4;
            const Row row = row_of(args, work, in_tile, shared);
            if (!row.is_there || column >= args.dim) continue;
            Pack<float, 4> sums = {};
            float denominator = 0;
            LYNX_UNROLL
            for (int group = 0; group < kGroups; group++) {
                const auto part = load<float, 4>(shared.floats + (group * kTileRows + in_tile) * kDim + column);
                denominator += shared.denominators[group][in_tile];
                LYNX_UNROLL
                for (int item = 0; item < 4; item++) sums.items[item] += part.items[item];
            }
            LYNX_UNROLL
            for (int item = 0; item < 4; item++) sums.items[item] /= denominator == 0 ? 1 : denominator;
            const int64_t rows = static_cast<int64_t>(args.branches) * args.queries * args.heads;
            const int64_t to = work.part * rows + row.index(args);
            store(args.outs + to * args.dim + column, sums);
            if (column == 0) args.lses[to] = (shared.maxima[in_tile] + log2f(denominator)) * 0.69314718f;
        }
    }
};

// The result over all keys from the results over parts of them: outputs weighted by exp(their LSE - the LSE).
struct Merge {
    static constexpr int kThreads = 128, kPhases = 1, kItems = 4;

    struct Args {
        const float* outs;  // (parts, rows, D)
        const float* lses;  // (parts, rows)
        void* out;          // (rows, D)
        Dtype dtype;
        float* lse;  // (rows,)
        int parts, dim;
        int64_t rows;
    };
    using Shared = Nothing;
    using Registers = Nothing;

    LYNX_PORTABLE static int rounds(const Args&, int) { return 1; }

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared&, Registers&) {
        const int64_t number = static_cast<int64_t>(place.block) * kThreads + place.thread;
        const int64_t row = number / (args.dim / kItems);
        const int column = static_cast<int>(number % (args.dim / kItems)) * kItems;
        if (row >= args.rows) return;
        float maximum = -INFINITY;
        for (int part = 0; part < args.parts; part++) {
            const float lse = args.lses[part * args.rows + row];
            if (lse > maximum) maximum = lse;
        }
        const float finite = maximum == -INFINITY ? 0 : maximum;  // no part has a key
        float denominator = 0, sums[kItems] = {};
        for (int part = 0; part < args.parts; part++) {
            const int64_t from = part * args.rows + row;
            const float weight = expf(args.lses[from] - finite);
            const auto out = load<float, kItems>(args.outs + from * args.dim + column);
            denominator += weight;
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) sums[item] += weight * out.items[item];
        }
        LYNX_UNROLL
        for (int item = 0; item < kItems; item++)
            put(args.out, args.dtype, row * args.dim + column + item, sums[item] / (denominator == 0 ? 1 : denominator));
        if (column == 0) args.lse[row] = finite + logf(denominator);
    }
};

}  // namespace lynx::decode
