// The product of a few tokens with a weight whose rows are contiguous, for the two CUDA kernels of the adapter.
//
// Reading the weight bounds the time. So a block gets some of its rows, and reads them once for up to kBlockM tokens. A
// load has 16 bytes, and each thread has several loads in flight while it multiplies others. Two blocks on a
// multiprocessor hide each other's barriers.
#pragma once

#include "common/loads.h"
#include "common/phases.h"

namespace lynx::adapter {

// (M, N) = values (M, K) times the transpose of the weight (N, K). M are the tokens.
//
// grid_n blocks share the rows of the weight evenly, for each of the grid_m tiles of tokens. A block goes through its
// rows in n_tiles tiles of tile_n rows, and through K in k_tiles tiles: a round is one K tile of one N tile.
struct Product {
    const void* weight;     // (N, K)
    int64_t weight_stride;  // of rows, in elements
    int m, n, k;
    int grid_n, grid_m;
    int n_tiles, tile_n;  // of a block; tile_n is at most kBlockN
    int k_tiles;
};

// How both kernels multiply. kLanes threads share a row of the weight, and each of kGroups groups of them has rows of
// its own. With kIsAligned every row of the weight starts and ends at a multiple of 16 bytes.
template <class Weight, int kM, bool kIsAligned>
struct SmallMMatmul {
    static constexpr int kBlockM = kM;
    static constexpr int kLanes = 128, kGroups = 2, kThreads = kLanes * kGroups;
    static constexpr int kBlocks = 2;
    static constexpr int kItems = 16 / sizeof(Weight);  // of a load
    static constexpr int kThreadRows = 4;  // of a thread: each value from shared memory serves 4 products
    static constexpr int kBlockN = kThreadRows * kGroups;
    // A thread has kPasses * kThreadRows loads in flight. An H200 moves 36 bytes/ns to a multiprocessor, so 29 KB in
    // the 0.8 us that a load takes (an estimate). Two blocks have 64 KB in flight with two passes and 32 KB with one.
    // Of 8 tokens, the values for two passes would not fit into the 48 KB of a block.
    static constexpr int kPasses = kBlockM <= 4 ? 2 : 1;
    static constexpr int kBlockK = kPasses * kLanes * kItems;
    static constexpr int kQuads = kItems / 4;
    static constexpr int kOutputs = kBlockN * kBlockM;
    static constexpr int kPartialStride = kLanes + 4;  // rows start four banks apart
    static constexpr int kFloats =
        kBlockM * kBlockK > kOutputs * kPartialStride ? kBlockM * kBlockK : kOutputs * kPartialStride;

    struct Registers {
        Bytes16 weights[kPasses][kThreadRows];  // of this round until they are multiplied, then of the next one
        float sums[kThreadRows][kBlockM];
    };
    // First the values of the K tile, (token, pass, quad, lane, 4): neighbouring lanes read neighbouring 16 bytes.
    // After the last K tile the partial sums of the lanes, (kOutputs, kPartialStride).
    struct alignas(16) Shared {
        float floats[kFloats];
    };

    struct Work {
        int first_token;
        int first_row, num_rows;  // of the N tile, which may have none
        int first_column;         // of the K tile
        bool is_last_k;           // whether it is the last K tile of its N tile
    };

    LYNX_PORTABLE static int rounds(const Product& product) { return product.n_tiles * product.k_tiles; }

    LYNX_PORTABLE static Work work_of(const Product& product, int block, int round) {
        const int row_block = block / product.grid_m, n_tile = round / product.k_tiles;
        const int k_tile = round - n_tile * product.k_tiles;
        const int each = product.n / product.grid_n, rest = product.n - each * product.grid_n;
        const int first = row_block * each + (row_block < rest ? row_block : rest);
        const int rows = each + (row_block < rest ? 1 : 0), from = n_tile * product.tile_n;
        const int to = from + product.tile_n < rows ? from + product.tile_n : rows;
        return {(block - row_block * product.grid_m) * kBlockM, first + from, to - from, k_tile * kBlockK,
                k_tile == product.k_tiles - 1};
    }

    LYNX_PORTABLE static int row_of(const Work& work, int group, int i) { return work.first_row + i * kGroups + group; }

    LYNX_PORTABLE static void prefetch_first_weights(const Product& product, const Place& place, Registers& registers) {
        const Work work = work_of(product, place.block, 0);
        LYNX_UNROLL
        for (int pass = 0; pass < kPasses; pass++) prefetch_weights(product, work, pass, place.thread, registers);
    }

    // Weights that do not exist become zeros.
    LYNX_PORTABLE static void prefetch_weights(const Product& product, const Work& work, int pass, int thread,
                                               Registers& registers) {
        const int lane = thread % kLanes, first_row = work.first_row + thread / kLanes;
        const int column = work.first_column + (pass * kLanes + lane) * kItems;
        const Weight* from = static_cast<const Weight*>(product.weight) + first_row * product.weight_stride + column;
        LYNX_UNROLL
        for (int i = 0; i < kThreadRows; i++) {
            const bool is_valid = first_row + i * kGroups < work.first_row + work.num_rows;
            if constexpr (kIsAligned)
                registers.weights[pass][i] = load16_streaming(from, is_valid && column < product.k);
            else
                registers.weights[pass][i] = load16_partial(from, is_valid ? product.k - column : 0);
            from += kGroups * product.weight_stride;
        }
    }

    // A thread loads values for kInputsOfAThread pairs of a pass and a token. With the numbers above every thread has
    // as many pairs, and checking whether a pair exists is not necessary. But without the check nvcc 13.0 spills.
    static constexpr int kInputsOfAThread = (kPasses * kBlockM + kGroups - 1) / kGroups;

    LYNX_PORTABLE static int pair_of(int thread, int input) { return thread / kLanes + input * kGroups; }

    LYNX_PORTABLE static int column_of(const Work& work, int thread, int pair) {
        return work.first_column + (pair / kBlockM * kLanes + thread % kLanes) * kItems;
    }

    LYNX_PORTABLE static void store_values(int thread, int pair, const float (&values)[kItems], Shared& shared) {
        LYNX_UNROLL
        for (int quad = 0; quad < kQuads; quad++) {
            AlignedVector<float, 4> vector;
            LYNX_UNROLL
            for (int i = 0; i < 4; i++) vector.items[i] = values[4 * quad + i];
            store(shared.floats + place_of(pair % kBlockM, pair / kBlockM, quad, thread % kLanes), vector);
        }
    }

    LYNX_PORTABLE static int place_of(int token, int pass, int quad, int lane) {
        return (((token * kPasses + pass) * kQuads + quad) * kLanes + lane) * 4;
    }

    // As soon as the weights of a pass have left their registers, those of the next round are loaded into them. Tokens
    // that do not exist have uninitialised values, and nobody reads their sums.
    LYNX_PORTABLE static void matmul(const Product& product, const Place& place, const Shared& shared,
                                     Registers& registers) {
        const bool has_next = place.round + 1 < rounds(product);  // not necessary, but without it nvcc 13.0 spills
        const Work next = work_of(product, place.block, place.round + 1);
        if (place.round % product.k_tiles == 0) {
            LYNX_UNROLL
            for (int i = 0; i < kThreadRows; i++) {
                LYNX_UNROLL
                for (int token = 0; token < kBlockM; token++) registers.sums[i][token] = 0;
            }
        }
        LYNX_UNROLL
        for (int pass = 0; pass < kPasses; pass++) {
            LYNX_UNROLL
            for (int quad = 0; quad < kQuads; quad++) {
                float weights[kThreadRows][4];
                LYNX_UNROLL
                for (int i = 0; i < kThreadRows; i++) {
                    LYNX_UNROLL
                    for (int item = 0; item < 4; item++)
                        weights[i][item] = item_of<Weight>(registers.weights[pass][i], 4 * quad + item);
                }
                if (quad == kQuads - 1 && has_next) prefetch_weights(product, next, pass, place.thread, registers);
                LYNX_UNROLL
                for (int token = 0; token < kBlockM; token++) {
                    const auto values =
                        load<float, 4>(shared.floats + place_of(token, pass, quad, place.thread % kLanes));
                    LYNX_UNROLL
                    for (int i = 0; i < kThreadRows; i++) {
                        LYNX_UNROLL
                        for (int item = 0; item < 4; item++)
                            registers.sums[i][token] += weights[i][item] * values.items[item];
                    }
                }
            }
        }
    }

    LYNX_PORTABLE static void store_partial_sums(int thread, const Registers& registers, Shared& shared) {
        LYNX_UNROLL
        for (int i = 0; i < kThreadRows; i++) {
            LYNX_UNROLL
            for (int token = 0; token < kBlockM; token++) {
                const int output = (thread / kLanes * kThreadRows + i) * kBlockM + token;
                shared.floats[output * kPartialStride + thread % kLanes] = registers.sums[i][token];
            }
        }
    }

    // The output of a thread, if it has one.
    struct Output {
        int token, row;
        bool is_valid;
    };

    LYNX_PORTABLE static Output output_of(const Product& product, const Work& work, int thread) {
        const int token = work.first_token + thread % kBlockM, place = thread / kBlockM;
        const int row = row_of(work, place / kThreadRows, place % kThreadRows);
        return {token, row, thread < kOutputs && token < product.m && row < work.first_row + work.num_rows};
    }

    LYNX_PORTABLE static float combine_partial_sums(int output, const Shared& shared) {
        float sums[4] = {};
        LYNX_UNROLL_BY(2)  // more would need registers that hold weights
        for (int lane = 0; lane < kLanes; lane += 4) {
            const auto partial = load<float, 4>(shared.floats + output * kPartialStride + lane);
            LYNX_UNROLL
            for (int i = 0; i < 4; i++) sums[i] += partial.items[i];
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
};

}  // namespace lynx::adapter
