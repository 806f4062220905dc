// Products of a few tokens with a weight whose rows lie side by side, as two CUDA kernels of the adapter take them.
//
// Reading the weight bounds the time. So a block is given some of its rows, and reads them once, for up to kTokens
// tokens: 16 bytes a load, several loads of each thread on their way while others are multiplied. Two blocks a
// multiprocessor hide each other's barriers.
#pragma once

#include "../packs.h"
#include "../phases.h"

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
    // Loads of a thread on their way are kPasses * kRows, and as many again behind them. A multiprocessor of an H200
    // moves 36 bytes a ns: of 0.8 us until they come, 29 KB. 2 blocks have 32 KB on their way at least, 64 KB in two
    // passes, for which 8 tokens leave no registers.
    static constexpr int kPasses = kTokens <= 4 ? 2 : 1;
    static constexpr int kChunk = kPasses * kLanes * kItems;  // columns
    static constexpr int kQuads = kItems / 4;
    static constexpr int kOutputs = kStrip * kTokens;
    static constexpr int kPartStride = kLanes + 4;  // four banks on from row to row
    static constexpr int kFloats =
        kTokens * kChunk > kOutputs * kPartStride ? kTokens * kChunk : kOutputs * kPartStride;

    struct Registers {
        Pack<Weight, kItems> packs[kPasses][kRows];  // of the round, until it multiplies: then of the next
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
        bool is_first, is_last;   // chunk of its strip
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
                chunk == 0, chunk == product.chunks - 1};
    }

    LYNX_PORTABLE static int row_of(const Work& work, int group, int i) { return work.first_row + i * kGroups + group; }

    // Asks for the weights of a round, if there is one. Zeros take the place of what is outside.
    LYNX_PORTABLE static void ask(const Product& product, int block, int round, int thread, Registers& registers) {
        if (round >= rounds(product)) return;
        const Work work = work_of(product, block, round);
        const int lane = thread % kLanes, group = thread / kLanes;
        LYNX_UNROLL
        for (int pass = 0; pass < kPasses; pass++) {
            const int column = work.first_column + (pass * kLanes + lane) * kItems;
            LYNX_UNROLL
            for (int i = 0; i < kRows; i++) {
                const int row = row_of(work, group, i);
                const bool is_there = row < work.first_row + work.num_rows;
                const Weight* from = static_cast<const Weight*>(product.weight) + row * product.weight_stride + column;
                if constexpr (kIsWhole) {
                    registers.packs[pass][i] = load_once<Weight, kItems>(from, is_there && column < product.columns);
                } else {
                    LYNX_UNROLL
                    for (int item = 0; item < kItems; item++) {
                        const bool is_item = is_there && column + item < product.columns;
                        registers.packs[pass][i].items[item] = is_item ? from[item] : Weight{};
                    }
                }
            }
        }
    }

    // The pairs of a pass and a token that a thread fills for its lane, and where they go.
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

    // Rows of tokens that are not there hold anything, and nobody looks at their sums.
    LYNX_PORTABLE static void multiply(const Product& product, const Place& place, const Shared& shared,
                                       Registers& registers) {
        const Work work = work_of(product, place.block, place.round);
        Pack<Weight, kItems> packs[kPasses][kRows];
        LYNX_UNROLL
        for (int pass = 0; pass < kPasses; pass++) {
            LYNX_UNROLL
            for (int i = 0; i < kRows; i++) packs[pass][i] = registers.packs[pass][i];
        }
        ask(product, place.block, place.round + 1, place.thread, registers);
        if (work.is_first) {
            LYNX_UNROLL
            for (int i = 0; i < kRows; i++) {
                LYNX_UNROLL
                for (int token = 0; token < kTokens; token++) registers.sums[i][token] = 0;
            }
        }
        LYNX_UNROLL
        for (int pass = 0; pass < kPasses; pass++) {
            float weights[kRows][kItems];
            LYNX_UNROLL
            for (int i = 0; i < kRows; i++) {
                LYNX_UNROLL
                for (int item = 0; item < kItems; item++) weights[i][item] = widen(packs[pass][i].items[item]);
            }
            LYNX_UNROLL
            for (int token = 0; token < kTokens; token++) {
                LYNX_UNROLL
                for (int quad = 0; quad < kQuads; quad++) {
                    const auto values = load<float, 4>(
                        shared.floats + place_of(token, pass, quad, place.thread % kLanes));
                    LYNX_UNROLL
                    for (int i = 0; i < kRows; i++) {
                        LYNX_UNROLL
                        for (int item = 0; item < 4; item++)
                            registers.sums[i][token] += weights[i][4 * quad + item] * values.items[item];
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
        for (int lane = 0; lane < kLanes; lane += 4) {
            const auto parts = load<float, 4>(shared.floats + output * kPartStride + lane);
            LYNX_UNROLL
            for (int i = 0; i < 4; i++) sums[i] += parts.items[i];
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
};

}  // namespace lynx::few
