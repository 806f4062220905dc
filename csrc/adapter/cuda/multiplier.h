// Products of a few tokens with a weight whose rows lie side by side, as two CUDA kernels of the adapter take them.
//
// Reading the weight bounds the time. So a block is given some of its rows, and reads them once, for up to kTokens
// tokens: 16 bytes a load, several loads of each thread on their way while others are multiplied. Two blocks a
// multiprocessor hide each other's barriers.
#pragma once

#include "common/packs.h"
#include "common/phases.h"

namespace lynx::few {

// sum over k of values[t][k] weight[n][k], for T tokens t and `rows` rows n.
//
// Some blocks share the rows evenly, as far as they go; each has `token_tiles` like it, one a tile of tokens, that run
// together. A block has its rows in strips, and their columns in chunks: a round is a chunk of a strip.
struct Product {
    const void* weight;     // (rows, columns)
    int64_t weight_stride;  // of rows, in elements
    int tokens, rows, columns;
    int row_blocks, token_tiles;
    int strips, strip_rows;  // of a block
    int chunks;
};

// How both kernels multiply, kTokens tokens in a block. Threads are kLanes that share a row times kGroups that have rows
// of their own.
template <class Weight, int kTokenCount, bool kIsWhole>
struct Multiplier {
    static constexpr int kTokens = kTokenCount;
    static constexpr int kLanes = 128, kGroups = 2, kThreads = kLanes * kGroups;
    static constexpr int kBlocks = 2;
    static constexpr int kItems = 16 / sizeof(Weight);  // a load
    static constexpr int kRows = 4;                     // of a thread: each value from shared memory serves 4 products
    static constexpr int kStrip = kRows * kGroups;
    // Loads of a thread on their way are kPasses * kRows. An H200 moves 36 bytes a ns to a multiprocessor: in the 0.8 us
    // that they take to come, by estimate, 29 KB. Two blocks have 64 KB on their way in two passes, and 32 KB in one, for
    // 8 tokens, whose values for two would not fit into the 48 KB of a block.
    static constexpr int kPasses = kTokens <= 4 ? 2 : 1;
    static constexpr int kChunk = kPasses * kLanes * kItems;  // columns
    static constexpr int kQuads = kItems / 4;
    static constexpr int kOutputs = kStrip * kTokens;
    static constexpr int kPartStride = kLanes + 4;  // four banks on from row to row
    static constexpr int kFloats =
        kTokens * kChunk > kOutputs * kPartStride ? kTokens * kChunk : kOutputs * kPartStride;

    struct Registers {
        Words weights[kPasses][kRows];  // of the round, until it has them multiplied: then of the next
        float sums[kRows][kTokens];
    };
    // First the chunk's values, (token, pass, quad, lane, 4): neighbouring lanes read neighbouring 16 bytes. Behind the
    // last chunk what the lanes have summed, (kOutputs, kPartStride).
    struct alignas(16) Shared {
        float floats[kFloats];
    };

    struct Work {
        int first_token;
        int first_row, num_rows;  // of the strip; there may be none
        int first_column;         // of the chunk
        bool is_last;             // chunk of its strip
    };

    LYNX_PORTABLE static int rounds(const Product& product) { return product.strips * product.chunks; }

    LYNX_PORTABLE static Work work_of(const Product& product, int block, int round) {
        const int row_block = block / product.token_tiles, strip = round / product.chunks;
        const int chunk = round - strip * product.chunks;
        const int each = product.rows / product.row_blocks, rest = product.rows - each * product.row_blocks;
        const int first = row_block * each + (row_block < rest ? row_block : rest);
        const int rows = each + (row_block < rest ? 1 : 0), from = strip * product.strip_rows;
        const int to = from + product.strip_rows < rows ? from + product.strip_rows : rows;
        return {(block - row_block * product.token_tiles) * kTokens, first + from, to - from, chunk * kChunk,
                chunk == product.chunks - 1};
    }

    LYNX_PORTABLE static int row_of(const Work& work, int group, int i) { return work.first_row + i * kGroups + group; }

    LYNX_PORTABLE static void ask_first(const Product& product, const Place& place, Registers& registers) {
        const Work work = work_of(product, place.block, 0);
        LYNX_UNROLL
        for (int pass = 0; pass < kPasses; pass++) ask(product, work, pass, place.thread, registers);
    }

    // Zeros take the place of weights that are outside.
    LYNX_PORTABLE static void ask(const Product& product, const Work& work, int pass, int thread,
                                  Registers& registers) {
        const int lane = thread % kLanes, first_row = work.first_row + thread / kLanes;
        const int column = work.first_column + (pass * kLanes + lane) * kItems;
        const Weight* from = static_cast<const Weight*>(product.weight) + first_row * product.weight_stride + column;
        LYNX_UNROLL
        for (int i = 0; i < kRows; i++) {
            const bool is_there = first_row + i * kGroups < work.first_row + work.num_rows;
            if constexpr (kIsWhole)
                registers.weights[pass][i] = load_words_once(from, is_there && column < product.columns);
            else
                registers.weights[pass][i] = gather_words(from, is_there ? product.columns - column : 0);
            from += kGroups * product.weight_stride;
        }
    }

    // The pairs of a pass and a token that a thread fills for its lane, and where they go. With the numbers above all have
    // as many, and those who ask whether a pair is one need not: but without the question nvcc 13.0 spills.
    static constexpr int kFills = (kPasses * kTokens + kGroups - 1) / kGroups;

    LYNX_PORTABLE static int pair_of(int thread, int fill) { return thread / kLanes + fill * kGroups; }

    LYNX_PORTABLE static int column_of(const Work& work, int thread, int pair) {
        return work.first_column + (pair / kTokens * kLanes + thread % kLanes) * kItems;
    }

    LYNX_PORTABLE static void leave_values(int thread, int pair, const float (&values)[kItems], Shared& shared) {
        LYNX_UNROLL
        for (int quad = 0; quad < kQuads; quad++) {
            Pack<float, 4> pack;
            LYNX_UNROLL
            for (int i = 0; i < 4; i++) pack.items[i] = values[4 * quad + i];
            store(shared.floats + place_of(pair % kTokens, pair / kTokens, quad, thread % kLanes), pack);
        }
    }

    LYNX_PORTABLE static int place_of(int token, int pass, int quad, int lane) {
        return (((token * kPasses + pass) * kQuads + quad) * kLanes + lane) * 4;
    }

    // As soon as the weights of a pass are out of their registers, those of the next round are asked for. Rows of tokens
    // that are not there hold anything, and nobody looks at their sums.
    LYNX_PORTABLE static void multiply(const Product& product, const Place& place, const Shared& shared,
                                       Registers& registers) {
        const bool has_next = place.round + 1 < rounds(product);  // else no rows, but without asking nvcc 13.0 spills
        const Work next = work_of(product, place.block, place.round + 1);
        if (place.round % product.chunks == 0) {
            LYNX_UNROLL
            for (int i = 0; i < kRows; i++) {
                LYNX_UNROLL
                for (int token = 0; token < kTokens; token++) registers.sums[i][token] = 0;
            }
        }
        LYNX_UNROLL
        for (int pass = 0; pass < kPasses; pass++) {
            LYNX_UNROLL
            for (int quad = 0; quad < kQuads; quad++) {
                float weights[kRows][4];
                LYNX_UNROLL
                for (int i = 0; i < kRows; i++) {
                    LYNX_UNROLL
                    for (int item = 0; item < 4; item++)
                        weights[i][item] = item_of<Weight>(registers.weights[pass][i], 4 * quad + item);
                }
                if (quad == kQuads - 1 && has_next) ask(product, next, pass, place.thread, registers);
                LYNX_UNROLL
                for (int token = 0; token < kTokens; token++) {
                    const auto values =
                        load<float, 4>(shared.floats + place_of(token, pass, quad, place.thread % kLanes));
                    LYNX_UNROLL
                    for (int i = 0; i < kRows; i++) {
                        LYNX_UNROLL
                        for (int item = 0; item < 4; item++)
                            registers.sums[i][token] += weights[i][item] * values.items[item];
                    }
                }
            }
        }
    }

    LYNX_PORTABLE static void leave_sums(int thread, const Registers& registers, Shared& shared) {
        LYNX_UNROLL
        for (int i = 0; i < kRows; i++) {
            LYNX_UNROLL
            for (int token = 0; token < kTokens; token++) {
                const int output = (thread / kLanes * kRows + i) * kTokens + token;
                shared.floats[output * kPartStride + thread % kLanes] = registers.sums[i][token];
            }
        }
    }

    // What a thread's output is of, and whether it has one.
    struct Output {
        int token, row;
        bool is_there;
    };

    LYNX_PORTABLE static Output output_of(const Product& product, const Work& work, int thread) {
        const int token = work.first_token + thread % kTokens, place = thread / kTokens;
        const int row = row_of(work, place / kRows, place % kRows);
        return {token, row,
                thread < kOutputs && token < product.tokens && row < work.first_row + work.num_rows};
    }

    LYNX_PORTABLE static float joined(int output, const Shared& shared) {
        float sums[4] = {};
        LYNX_UNROLL_BY(2)  // more would take the registers of weights
        for (int lane = 0; lane < kLanes; lane += 4) {
            const auto parts = load<float, 4>(shared.floats + output * kPartStride + lane);
            LYNX_UNROLL
            for (int i = 0; i < 4; i++) sums[i] += parts.items[i];
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
};

}  // namespace lynx::few
