// The adapter for a few tokens as two CUDA kernels: into the bottleneck, and out of it. Shapes: T tokens, width d,
// bottleneck r.
//
// Nothing is written but the output, the statistics and two tensors of width r; every sum is of fixed parts in a fixed
// order.
#pragma once

#include <cmath>

#include "multiplier.h"
#include "adapter/problem.h"

namespace lynx::few {

LYNX_PORTABLE float activate(Activation activation, float x) {
    switch (activation) {
        case Activation::kSilu: return x / (1 + expf(-x));
        case Activation::kRelu: return x < 0 ? 0 : x;  // what is not a number stays none
        case Activation::kGelu: return x * 0.5f * (1 + erff(x * 0.70710678f));
        case Activation::kGeluTanh: return x * 0.5f * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    }
    return x;
}

// preactivation = LayerNorm(x) Wd^T + bd in the type of the weights, and its activation. Every block computes the
// statistics of its tokens, in two passes as the definition does, while its first weights are on their way.
template <class Weight, int kTokenCount, bool kIsWhole>
struct Down {
    using Multiply = Multiplier<Weight, kTokenCount, kIsWhole>;
    static constexpr int kTokens = kTokenCount, kItems = Multiply::kItems;
    static constexpr int kThreads = Multiply::kThreads, kBlocks = Multiply::kBlocks, kPhases = 7;
    static constexpr int kRowLanes = kTokens <= 4 ? 64 : 32;  // that sum up a token's row,
    static constexpr int kRowLoads = 4;                       // with so many 16-byte loads on their way
    static_assert(kTokens * kRowLanes <= kThreads, "a thread has one token at most");

    struct Args {
        Product product;
        Values x;          // (T, d)
        int64_t x_stride;  // of rows, in elements
        Values norm_weight, norm_bias, bias;
        float eps;
        Activation activation;
        float *mean, *rstd;                // (T,)
        Weight *preactivation, *activated;  // (T, r)
    };
    struct Shared {
        typename Multiply::Shared chunk;
        float sums[kTokens][kRowLanes], corrections[kTokens][kRowLanes], squares[kTokens][kRowLanes];
        float mean[kTokens], rstd[kTokens];
    };
    using Registers = typename Multiply::Registers;

    LYNX_PORTABLE static int rounds(const Args& args, int) { return Multiply::rounds(args.product); }

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared& shared, Registers& registers) {
        const auto work = Multiply::work_of(args.product, place.block, place.round);
        const bool has_norm = args.norm_weight.data != nullptr;
        const int row_token = place.thread / kRowLanes, row_lane = place.thread % kRowLanes;
        const bool has_row = has_norm && place.round == 0 && row_token < kTokens &&
                             work.first_token + row_token < args.product.tokens;
        if constexpr (kPhase == 0) {
            if (place.round == 0) Multiply::ask_first(args.product, place, registers);
            if (has_row) {
                const Sums sums = sums_of(args, work.first_token + row_token, row_lane, 0);
                shared.sums[row_token][row_lane] = sums.values;
            }
        } else if constexpr (kPhase == 1) {
            if (has_row) {
                const float mean = total(shared.sums[row_token]) / args.product.columns;
                const Sums sums = sums_of(args, work.first_token + row_token, row_lane, mean);
                shared.corrections[row_token][row_lane] = sums.values;
                shared.squares[row_token][row_lane] = sums.squares;
            }
        } else if constexpr (kPhase == 2) {
            if (has_row && row_lane == 0) leave_statistics(args, place, work.first_token, row_token, shared);
        } else if constexpr (kPhase == 3) {
            fill(args, work, place.thread, shared);
        } else if constexpr (kPhase == 4) {
            Multiply::multiply(args.product, place, shared.chunk, registers);
        } else if constexpr (kPhase == 5) {
            if (work.is_last) Multiply::leave_sums(place.thread, registers, shared.chunk);
        } else {
            const auto output = Multiply::output_of(args.product, work, place.thread);
            if (work.is_last && output.is_there) write(args, output, place.thread, shared);
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
            case Dtype::kDouble: break;  // refused before any launch
        }
        return {};
    }

    template <class Element>
    LYNX_PORTABLE static Sums sums_as(const Args& args, int token, int lane, float shift) {
        constexpr int kRowItems = 16 / sizeof(Element), kStep = kRowLanes * kRowItems;
        const Element* row = static_cast<const Element*>(args.x.data) + token * args.x_stride;
        const int columns = args.product.columns;
        float values[kRowItems] = {}, squares[kRowItems] = {};
        LYNX_UNROLL_BY(1)
        for (int first = lane * kRowItems; first < columns; first += kRowLoads * kStep) {
            Words words[kRowLoads];
            LYNX_UNROLL
            for (int i = 0; i < kRowLoads; i++) {
                const int column = first + i * kStep;
                words[i] = args.x.takes_packs && column + kRowItems <= columns
                               ? load_words(row + column)
                               : gather_words(row + column, columns - column);
            }
            LYNX_UNROLL
            for (int i = 0; i < kRowLoads; i++) {
                LYNX_UNROLL
                for (int item = 0; item < kRowItems; item++) {
                    const bool is_there = first + i * kStep + item < columns;
                    const float away = is_there ? item_of<Element>(words[i], item) - shift : 0;
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

    LYNX_PORTABLE static float total(const float (&parts)[kRowLanes]) {
        float sums[4] = {};
        LYNX_UNROLL_BY(2)  // all at once would take registers that weights keep meanwhile
        for (int lane = 0; lane < kRowLanes; lane += 4) {
            const auto four = load<float, 4>(parts + lane);
            LYNX_UNROLL
            for (int i = 0; i < 4; i++) sums[i] += four.items[i];
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    // Around the first mean, which where |mean| >> deviation is not exact enough, the second is.
    LYNX_PORTABLE static void leave_statistics(const Args& args, const Place& place, int first_token, int token,
                                               Shared& shared) {
        const float first = total(shared.sums[token]) / args.product.columns;
        const float correction = total(shared.corrections[token]) / args.product.columns;
        const float variance = total(shared.squares[token]) / args.product.columns - correction * correction;
        const float mean = first + correction, rstd = 1 / sqrtf((variance < 0 ? 0 : variance) + args.eps);
        shared.mean[token] = mean;
        shared.rstd[token] = rstd;
        if (place.block >= args.product.token_tiles) return;  // the first rows' blocks tell
        args.mean[first_token + token] = mean;
        args.rstd[first_token + token] = rstd;
    }

    LYNX_PORTABLE static void fill(const Args& args, const typename Multiply::Work& work, int thread, Shared& shared) {
        const int columns = args.product.columns;
        float norm_weight[kItems], norm_bias[kItems];
        LYNX_UNROLL_BY(1)  // what all of them read at once would take the registers of weights
        for (int i = 0; i < Multiply::kFills; i++) {
            const int pair = Multiply::pair_of(thread, i), in_tile = pair % kTokens;
            const int token = work.first_token + in_tile, column = Multiply::column_of(work, thread, pair);
            if (pair >= Multiply::kPasses * kTokens) continue;
            // Tokens of a pass follow each other: its columns' weights serve them all.
            const bool is_new_pass = i == 0 || i * Multiply::kGroups % kTokens == 0;
            Raw<kItems> weight_raw = {}, bias_raw = {}, raw = {};
            if (is_new_pass && args.norm_weight.data != nullptr)
                weight_raw = fetch<kItems>(args.norm_weight, column, columns - column);
            if (is_new_pass && args.norm_bias.data != nullptr)
                bias_raw = fetch<kItems>(args.norm_bias, column, columns - column);
            const bool is_there = token < args.product.tokens;
            if (is_there) raw = fetch<kItems>(args.x, token * args.x_stride + column, columns - column);
            if (is_new_pass) {
                widen(weight_raw, args.norm_weight.dtype, norm_weight);
                widen(bias_raw, args.norm_bias.dtype, norm_bias);
            }
            if (!is_there) continue;
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
            Multiply::leave_values(thread, pair, x, shared.chunk);
        }
    }

    LYNX_PORTABLE static void write(const Args& args, const typename Multiply::Output& output, int thread,
                                    const Shared& shared) {
        const RawNumber bias = fetch_one(args.bias, output.row);
        const float sum = Multiply::joined(thread, shared.chunk) + widen(bias, args.bias.dtype);
        const int64_t to = static_cast<int64_t>(output.token) * args.product.rows + output.row;
        Weight rounded;  // before the activation, as backward reads it
        narrow(sum, rounded);
        args.preactivation[to] = rounded;
        narrow(activate(args.activation, widen(rounded)), args.activated[to]);
    }
};

// out = x + scale * (activated Wu^T + bu).
template <class Weight, int kTokenCount, bool kIsWhole>
struct Up {
    using Multiply = Multiplier<Weight, kTokenCount, kIsWhole>;
    static constexpr int kTokens = kTokenCount, kItems = Multiply::kItems;
    static constexpr int kThreads = Multiply::kThreads, kBlocks = Multiply::kBlocks, kPhases = 4;

    struct Args {
        Product product;
        const Weight* activated;  // (T, r)
        Values x;                 // (T, d)
        int64_t x_stride;         // of rows, in elements
        Values bias, scale;
        void* out;  // (T, d), in the type of x
    };
    using Shared = typename Multiply::Shared;
    using Registers = typename Multiply::Registers;

    LYNX_PORTABLE static int rounds(const Args& args, int) { return Multiply::rounds(args.product); }

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared& shared, Registers& registers) {
        const auto work = Multiply::work_of(args.product, place.block, place.round);
        if constexpr (kPhase == 0) {
            if (place.round == 0) Multiply::ask_first(args.product, place, registers);
            fill(args, work, place.thread, shared);
        } else if constexpr (kPhase == 1) {
            Multiply::multiply(args.product, place, shared, registers);
        } else if constexpr (kPhase == 2) {
            if (work.is_last) Multiply::leave_sums(place.thread, registers, shared);
        } else {
            const auto output = Multiply::output_of(args.product, work, place.thread);
            if (work.is_last && output.is_there) write(args, output, place.thread, shared);
        }
    }

   private:
    LYNX_PORTABLE static void fill(const Args& args, const typename Multiply::Work& work, int thread, Shared& shared) {
        Words words[Multiply::kFills];
        LYNX_UNROLL
        for (int i = 0; i < Multiply::kFills; i++) {
            const int pair = Multiply::pair_of(thread, i), token = work.first_token + pair % kTokens;
            const int column = Multiply::column_of(work, thread, pair);
            const bool is_there = pair < Multiply::kPasses * kTokens && token < args.product.tokens;
            const Weight* from = args.activated + static_cast<int64_t>(token) * args.product.columns + column;
            if constexpr (kIsWhole)
                words[i] = is_there && column < args.product.columns ? load_words(from) : Words{};
            else
                words[i] = gather_words(from, is_there ? args.product.columns - column : 0);
        }
        LYNX_UNROLL
        for (int i = 0; i < Multiply::kFills; i++) {
            const int pair = Multiply::pair_of(thread, i);
            if (pair >= Multiply::kPasses * kTokens) continue;
            float values[kItems];
            LYNX_UNROLL
            for (int item = 0; item < kItems; item++) values[item] = item_of<Weight>(words[i], item);
            Multiply::leave_values(thread, pair, values, shared);
        }
    }

    LYNX_PORTABLE static void write(const Args& args, const typename Multiply::Output& output, int thread,
                                    const Shared& shared) {
        const RawNumber x = fetch_one(args.x, output.token * args.x_stride + output.row);
        const RawNumber bias = fetch_one(args.bias, output.row), scale = fetch_one(args.scale, 0);
        const float up = Multiply::joined(thread, shared) + widen(bias, args.bias.dtype);
        put(args.out, args.x.dtype, static_cast<int64_t>(output.token) * args.product.rows + output.row,
            widen(x, args.x.dtype) + widen(scale, args.scale.dtype) * up);
    }
};

}  // namespace lynx::few
