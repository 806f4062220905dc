// pack_embeddings as CUDA kernels. Shapes: T rows, V rows of the table, M vision rows, width d.
//
// A thread moves kItems neighbours of a row at once, in accesses of 16 bytes; where rows do not start and end at
// multiples of 16 bytes, single ones.
#pragma once

#include <cassert>
#include <cstdint>
#include <type_traits>

#include "common/numbers.h"
#include "common/packs.h"
#include "common/phases.h"

namespace lynx {

// As many that neither type is moved by less than 16 bytes.
template <class First, class Second>
constexpr int items_of_a_pack() {
    return 16 / static_cast<int>(sizeof(First) < sizeof(Second) ? sizeof(First) : sizeof(Second));
}

template <class To, class From, int kItems>
LYNX_PORTABLE Pack<To, kItems> convert(const Pack<From, kItems>& pack) {
    if constexpr (std::is_same_v<To, From>) {
        return pack;
    } else {
        Pack<To, kItems> result;
        for (int i = 0; i < kItems; i++) narrow(widen(pack.items[i]), result.items[i]);
        return result;
    }
}

// out[t] = vision[vision_index[t]] where that is >= 0, else embedding[token_ids[t]].
template <class Table, class Vision, int kPackItems>
struct PackRows {
    static constexpr int kItems = kPackItems, kThreads = 128, kPhases = 1;
    static constexpr int kPacks = 4;  // loads in flight: 128 threads have a row of 4096 in 16 bits on its way
    static constexpr int kColumns = kThreads * kPacks * kItems;  // of a block

    struct Args {
        const int64_t* token_ids;     // (T,)
        const int32_t* vision_index;  // (T,)
        const Table* embedding;       // (V, d)
        const Vision* vision;         // (M, d)
        Table* out;                   // (T, d)
        int64_t num_embeddings, num_vision, embedding_stride, vision_stride;  // strides of rows, in elements
        int width, blocks_of_a_row;
    };
    using Shared = Nothing;
    using Registers = Nothing;

    LYNX_PORTABLE static int rounds(const Args&, int) { return 1; }

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared&, Registers&) {
        const int64_t row = place.block / args.blocks_of_a_row;
        const int first = place.block % args.blocks_of_a_row * kColumns + place.thread * kItems;
        Table* out = args.out + row * args.width;
        const int64_t picture = args.vision_index[row];
        if (picture >= 0) {
            assert(picture < args.num_vision && "pack_embeddings: a vision_index is out of range");
            copy(args.vision + picture * args.vision_stride, out, first, args.width);
        } else {
            const int64_t token = args.token_ids[row];
            assert(0 <= token && token < args.num_embeddings && "pack_embeddings: a token id is out of range");
            copy(args.embedding + token * args.embedding_stride, out, first, args.width);
        }
    }

   private:
    template <class From>
    LYNX_PORTABLE static void copy(const From* from, Table* to, int first, int width) {
        Pack<From, kItems> packs[kPacks];
#if defined(__CUDACC__)
#pragma unroll
#endif
        for (int i = 0; i < kPacks; i++) {
            const int column = first + i * kThreads * kItems;
            if (column < width) packs[i] = load<From, kItems>(from + column);
        }
#if defined(__CUDACC__)
#pragma unroll
#endif
        for (int i = 0; i < kPacks; i++) {
            const int column = first + i * kThreads * kItems;
            if (column < width) store(to + column, convert<Table>(packs[i]));
        }
    }
};

// For each vision row the first and the last row that it went to, as T - first and last + 1: 0 is what an unused one
// keeps. Integers, so that the order in which atomics arrive changes nothing.
struct FindUses {
    static constexpr int kThreads = 256, kPhases = 1;

    struct Args {
        const int32_t* vision_index;  // (T,)
        int32_t* uses;                // (2, M), zeros before
        int num_rows, num_vision;
    };
    using Shared = Nothing;
    using Registers = Nothing;

    LYNX_PORTABLE static int rounds(const Args&, int) { return 1; }

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared&, Registers&) {
        const int64_t row = static_cast<int64_t>(place.block) * kThreads + place.thread;
        if (row >= args.num_rows) return;
        const int picture = args.vision_index[row];
        if (picture < 0) return;
        assert(picture < args.num_vision && "pack_embeddings_backward: a vision_index is out of range");
        atomic_max(args.uses + picture, args.num_rows - static_cast<int>(row));
        atomic_max(args.uses + args.num_vision + picture, static_cast<int>(row) + 1);
    }
};

// grad_vision[m] = the sum of grad[t] over the rows t with vision_index[t] = m, in fp32 and in the order of t.
//
// A block has some columns of one vision row. It goes through the rows from the first use to the last, kThreads of them
// a round: the threads look which of them are uses, then each adds up its own columns of those.
template <class Table, class Vision, int kPackItems>
struct SumRows {
    static constexpr int kItems = kPackItems, kThreads = 128, kPhases = 2;
    static constexpr int kColumns = kThreads * kItems;

    struct Args {
        const Table* grad;            // (T, d)
        const int32_t* vision_index;  // (T,)
        const int32_t* uses;          // (2, M) of FindUses
        Vision* out;                  // (M, d)
        int64_t grad_stride;          // of rows, in elements
        int num_rows, num_vision, width, blocks_of_a_row;
    };
    struct Shared {
        bool is_use[kThreads];
    };
    struct Registers {
        float sums[kItems];
    };

    LYNX_PORTABLE static int rounds(const Args& args, int block) {
        const int length = last_use(args, block) - first_use(args, block);
        return length > 0 ? (length + kThreads) / kThreads : 1;
    }

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared& shared, Registers& registers) {
        const int picture = place.block / args.blocks_of_a_row, last = last_use(args, place.block);
        const int first = first_use(args, place.block) + place.round * kThreads;  // of this round
        if constexpr (kPhase == 0) {
            const int row = first + place.thread;
            shared.is_use[place.thread] = row <= last && args.vision_index[row] == picture;
        } else {
            const int column = place.block % args.blocks_of_a_row * kColumns + place.thread * kItems;
            if (column >= args.width) return;
            for (int i = 0; i < kThreads && first + i <= last; i++)
                if (shared.is_use[i]) add(args.grad + (first + i) * args.grad_stride + column, registers);
            if (last - first >= kThreads) return;  // there is another round
            Pack<Vision, kItems> pack;
            for (int i = 0; i < kItems; i++) narrow(registers.sums[i], pack.items[i]);
            store(args.out + static_cast<int64_t>(picture) * args.width + column, pack);
        }
    }

   private:
    LYNX_PORTABLE static int first_use(const Args& args, int block) {
        return args.num_rows - args.uses[block / args.blocks_of_a_row];  // T where there is none
    }

    LYNX_PORTABLE static int last_use(const Args& args, int block) {
        return args.uses[args.num_vision + block / args.blocks_of_a_row] - 1;  // -1 where there is none
    }

    LYNX_PORTABLE static void add(const Table* row, Registers& registers) {
        const Pack<Table, kItems> pack = load<Table, kItems>(row);
        for (int i = 0; i < kItems; i++) registers.sums[i] += widen(pack.items[i]);
    }
};

}  // namespace lynx
