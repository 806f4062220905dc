// The adapter for a few tokens as two CUDA kernels: down to the bottleneck, and up from it. Shapes: T tokens, width d,
// bottleneck r.
//
// They write only the output, mean and rstd, and two tensors of width r. Every sum has a fixed order.
#pragma once

#include "adapter/activations.h"
#include "matmul.h"

namespace lynx::adapter {

// preactivation = LayerNorm(x) Wd^T + bd in the type of the weights, and its activation. Every block computes mean and
// rstd of its tokens, in two passes as the definition does, while its first weights are in flight.
LYNX_GLOBAL(adapter_fwd_small_m_down_kernel)
template <class Weight, int kM, bool kIsAligned>
struct SmallMDown {
    LYNX_RUN_BY(adapter_fwd_small_m_down_kernel, SmallMDown)
    using Matmul = SmallMMatmul<Weight, kM, kIsAligned>;
    static constexpr int kBlockM = kM, kItems = Matmul::kItems;
    static constexpr int kThreads = Matmul::kThreads, kBlocks = Matmul::kBlocks, kPhases = 7;
    static constexpr int kRowLanes = kBlockM <= 4 ? 64 : 32;  // threads that sum a token's row
    static constexpr int kRowLoads = 4;                       // 16-byte loads that each of them has in flight
    static_assert(kBlockM * kRowLanes <= kThreads, "a thread sums at most one token's row");

    struct Args {
        Product product;
        Values x;          // (T, d)
        int64_t x_stride;  // of rows, in elements
        Values norm_weight, norm_bias, bias;
        float eps;
        Activation activation;
        float *mean, *rstd;                 // (T,)
        Weight *preactivation, *activated;  // (T, r)
    };
    struct Shared {
        typename Matmul::Shared k_tile;
        float sums[kBlockM][kRowLanes], corrections[kBlockM][kRowLanes], squares[kBlockM][kRowLanes];
        float mean[kBlockM], rstd[kBlockM];
    };
    using Registers = typename Matmul::Registers;

    LYNX_PORTABLE static int rounds(const Args& args, int) { return Matmul::rounds(args.product); }

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared& shared, Registers& registers) {
        const auto work = Matmul::work_of(args.product, place.block, place.round);
        const bool has_norm = args.norm_weight.data != nullptr;
        const int row_token = place.thread / kRowLanes, row_lane = place.thread % kRowLanes;
        const bool has_row = has_norm && place.round == 0 && row_token < kBlockM &&
                             work.first_token + row_token < args.product.m;
        if constexpr (kPhase == 0) {
            if (place.round == 0) Matmul::prefetch_first_weights(args.product, place, registers);
            if (has_row) {
                const Sums sums = sums_of(args, work.first_token + row_token, row_lane, 0);
                shared.sums[row_token][row_lane] = sums.values;
            }
        } else if constexpr (kPhase == 1) {
            if (has_row) {
                const float mean = sum_of(shared.sums[row_token]) / args.product.k;
                const Sums sums = sums_of(args, work.first_token + row_token, row_lane, mean);
                shared.corrections[row_token][row_lane] = sums.values;
                shared.squares[row_token][row_lane] = sums.squares;
            }
        } else if constexpr (kPhase == 2) {
            if (has_row && row_lane == 0) store_statistics(args, place, work.first_token, row_token, shared);
        } else if constexpr (kPhase == 3) {
            load_input(args, work, place.thread, shared);
        } else if constexpr (kPhase == 4) {
            Matmul::matmul(args.product, place, shared.k_tile, registers);
        } else if constexpr (kPhase == 5) {
            if (work.is_last_k) Matmul::store_partial_sums(place.thread, registers, shared.k_tile);
        } else {
            const auto output = Matmul::output_of(args.product, work, place.thread);
            if (work.is_last_k && output.is_valid) write(args, output, place.thread, shared);
        }
    }

   private:
    struct Sums {
        float values, squares;  // of x - shift
    };

    LYNX_PORTABLE static Sums sums_of(const Args& args, int token, int lane, float shift) {
        switch (args.x.dtype) {
            case Dtype::kFloat: return sums_as<float>(args, token, lane, shift);
            case Dtype::kHalf: return sums_as<Half>(args, token, lane, shift);
            case Dtype::kBFloat16: return sums_as<BFloat16>(args, token, lane, shift);
            case Dtype::kDouble: break;  // rejected before any launch
        }
        return {};
    }

    template <class Element>
    LYNX_PORTABLE static Sums sums_as(const Args& args, int token, int lane, float shift) {
        constexpr int kRowItems = 16 / sizeof(Element), kStep = kRowLanes * kRowItems;
        const Element* row = static_cast<const Element*>(args.x.data) + token * args.x_stride;
        const int columns = args.product.k;
        float values[kRowItems] = {}, squares[kRowItems] = {};
        LYNX_UNROLL_BY(1)
        for (int first = lane * kRowItems; first < columns; first += kRowLoads * kStep) {
            Bytes16 words[kRowLoads];
            LYNX_UNROLL
            for (int i = 0; i < kRowLoads; i++) {
                const int column = first + i * kStep;
                words[i] = args.x.is_aligned && column + kRowItems <= columns
                               ? load16(row + column)
                               : load16_partial(row + column, columns - column);
            }
            LYNX_UNROLL
            for (int i = 0; i < kRowLoads; i++) {
                LYNX_UNROLL
                for (int item = 0; item < kRowItems; item++) {
                    const bool is_valid = first + i * kStep + item < columns;
                    const float away = is_valid ? item_of<Element>(words[i], item) - shift : 0;
                    values[item] += away;
                    squares[item] += away * away;
                }
            }
        }
        Sums sums = {};
        LYNX_UNROLL
        for (int item = 0; item < kRowItems; item++) sums.values += values[item], sums.squares += squares[item];
        return sums;
    }

    LYNX_PORTABLE static float sum_of(const float (&lanes)[kRowLanes]) {
        float sums[4] = {};
        LYNX_UNROLL_BY(2)  // full unrolling would need registers that hold weights
        for (int lane = 0; lane < kRowLanes; lane += 4) {
            const auto four = load<float, 4>(lanes + lane);
            LYNX_UNROLL
            for (int i = 0; i < 4; i++) sums[i] += four.items[i];
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    // Where |mean| >> std, the first mean is not exact enough. The mean of the deviations from it corrects it.
    LYNX_PORTABLE static void store_statistics(const Args& args, const Place& place, int first_token, int token,
                                               Shared& shared) {
        const float first = sum_of(shared.sums[token]) / args.product.k;
        const float correction = sum_of(shared.corrections[token]) / args.product.k;
        const float variance = sum_of(shared.squares[token]) / args.product.k - correction * correction;
        const float mean = first + correction, rstd = 1 / sqrtf((variance < 0 ? 0 : variance) + args.eps);
        shared.mean[token] = mean;
        shared.rstd[token] = rstd;
        if (place.block >= args.product.grid_m) return;  // one block of each tile of tokens writes
        args.mean[first_token + token] = mean;
        args.rstd[first_token + token] = rstd;
    }

    LYNX_PORTABLE static void load_input(const Args& args, const typename Matmul::Work& work, int thread,
                                         Shared& shared) {
        const int columns = args.product.k;
        float norm_weight[kItems], norm_bias[kItems];
        LYNX_UNROLL_BY(1)  // unrolling would need registers that hold weights
        for (int i = 0; i < Matmul::kInputsOfAThread; i++) {
            const int pair = Matmul::pair_of(thread, i), in_tile = pair % kBlockM;
            const int token = work.first_token + in_tile, column = Matmul::column_of(work, thread, pair);
            if (pair >= Matmul::kPasses * kBlockM) continue;
            // The tokens of a pass follow each other and share the norm's weights of its columns.
            const bool is_new_pass = i == 0 || i * Matmul::kGroups % kBlockM == 0;
            Raw<kItems> weight_raw = {}, bias_raw = {}, raw = {};
            if (is_new_pass && args.norm_weight.data != nullptr)
                weight_raw = fetch<kItems>(args.norm_weight, column, columns - column);
            if (is_new_pass && args.norm_bias.data != nullptr)
                bias_raw = fetch<kItems>(args.norm_bias, column, columns - column);
            const bool is_valid = token < args.product.m;
            if (is_valid) raw = fetch<kItems>(args.x, token * args.x_stride + column, columns - column);
            if (is_new_pass) {
                widen(weight_raw, args.norm_weight.dtype, norm_weight);
                widen(bias_raw, args.norm_bias.dtype, norm_bias);
            }
            if (!is_valid) continue;
            float x[kItems];
            widen(raw, args.x.dtype, x);
            if (args.norm_weight.data != nullptr) {
                const float mean = shared.mean[in_tile], rstd = shared.rstd[in_tile];
                LYNX_UNROLL
                for (int item = 0; item < kItems; item++) {
                    const float normalized = (x[item] - mean) * rstd * norm_weight[item] + norm_bias[item];
                    x[item] = column + item < columns ? normalized : 0;
                }
            }
            Matmul::store_values(thread, pair, x, shared.k_tile);
        }
    }

    LYNX_PORTABLE static void write(const Args& args, const typename Matmul::Output& output, int thread,
                                    const Shared& shared) {
        const RawNumber bias = fetch_one(args.bias, output.row);
        const float sum = Matmul::combine_partial_sums(thread, shared.k_tile) + widen(bias, args.bias.dtype);
        const int64_t to = static_cast<int64_t>(output.token) * args.product.n + output.row;
        Weight rounded;  // the activation takes the rounded value, as backward reads it
        narrow(sum, rounded);
        args.preactivation[to] = rounded;
        narrow(activations::activate(args.activation, widen(rounded)), args.activated[to]);
    }
};

// out = x + scale * (activated Wu^T + bu).
LYNX_GLOBAL(adapter_fwd_small_m_up_kernel)
template <class Weight, int kM, bool kIsAligned>
struct SmallMUp {
    LYNX_RUN_BY(adapter_fwd_small_m_up_kernel, SmallMUp)
    using Matmul = SmallMMatmul<Weight, kM, kIsAligned>;
    static constexpr int kBlockM = kM, kItems = Matmul::kItems;
    static constexpr int kThreads = Matmul::kThreads, kBlocks = Matmul::kBlocks, kPhases = 4;

    struct Args {
        Product product;
        const Weight* activated;  // (T, r)
        Values x;                 // (T, d)
        int64_t x_stride;         // of rows, in elements
        Values bias, scale;
        void* out;  // (T, d), in the type of x
    };
    using Shared = typename Matmul::Shared;
    using Registers = typename Matmul::Registers;

    LYNX_PORTABLE static int rounds(const Args& args, int) { return Matmul::rounds(args.product); }

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared& shared, Registers& registers) {
        const auto work = Matmul::work_of(args.product, place.block, place.round);
        if constexpr (kPhase == 0) {
            if (place.round == 0) Matmul::prefetch_first_weights(args.product, place, registers);
            load_input(args, work, place.thread, shared);
        } else if constexpr (kPhase == 1) {
            Matmul::matmul(args.product, place, shared, registers);
        } else if constexpr (kPhase == 2) {
            if (work.is_last_k) Matmul::store_partial_sums(place.thread, registers, shared);
        } else {
            const auto output = Matmul::output_of(args.product, work, place.thread);
            if (work.is_last_k && output.is_valid) write(args, output, place.thread, shared);
        }
    }

   private:
    LYNX_PORTABLE static void load_input(const Args& args, const typename Matmul::Work& work, int thread,
                                         Shared& shared) {
        Bytes16 words[Matmul::kInputsOfAThread];
        LYNX_UNROLL
        for (int i = 0; i < Matmul::kInputsOfAThread; i++) {
            const int pair = Matmul::pair_of(thread, i), token = work.first_token + pair % kBlockM;
            const int column = Matmul::column_of(work, thread, pair);
            const bool is_valid = pair < Matmul::kPasses * kBlockM && token < args.product.m;
            const Weight* from = args.activated + static_cast<int64_t>(token) * args.product.k + column;
            if constexpr (kIsAligned)
                words[i] = is_valid && column < args.product.k ? load16(from) : Bytes16{};
            else
                words[i] = load16_partial(from, is_valid ? args.product.k - column : 0);
        }
        LYNX_UNROLL
        for (int i = 0; i < Matmul::kInputsOfAThread; i++) {
            const int pair = Matmul::pair_of(thread, i);
            if (pair >= Matmul::kPasses * kBlockM) continue;
            float values[kItems];
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) values[item] = item_of<Weight>(words[i], item);
            Matmul::store_values(thread, pair, values, shared);
        }
    }

    LYNX_PORTABLE static void write(const Args& args, const typename Matmul::Output& output, int thread,
                                    const Shared& shared) {
        const RawNumber x = fetch_one(args.x, output.token * args.x_stride + output.row);
        const RawNumber bias = fetch_one(args.bias, output.row), scale = fetch_one(args.scale, 0);
        const float up = Matmul::combine_partial_sums(thread, shared) + widen(bias, args.bias.dtype);
        store_one(args.out, args.x.dtype, static_cast<int64_t>(output.token) * args.product.n + output.row,
            widen(x, args.x.dtype) + widen(scale, args.scale.dtype) * up);
    }
};

}  // namespace lynx::adapter
