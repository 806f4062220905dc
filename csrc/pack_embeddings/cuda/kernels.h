// pack_embeddings as CUDA kernels. Shapes: T rows, V rows of the table, M vision rows, width d.
//
// A thread moves kItems neighbouring numbers of a row at once, in loads and stores of 16 bytes. Where rows do not start
// and end at multiples of 16 bytes, kItems is 1.
#pragma once

#include <cassert>
#include <cstdint>
#include <type_traits>

#include "common/loads.h"
#include "common/numbers.h"
#include "common/phases.h"

namespace lynx::embeddings {

// So many items that no type is moved in less than 16 bytes.
template <class First, class Second>
constexpr int items_of_a_vector() {
    return 16 / static_cast<int>(sizeof(First) < sizeof(Second) ? sizeof(First) : sizeof(Second));
}

template <class To, class From, int kItems>
LYNX_PORTABLE AlignedVector<To, kItems> convert(const AlignedVector<From, kItems>& vector) {
    if constexpr (std::is_same_v<To, From>) {
        return vector;
    } else {
        AlignedVector<To, kItems> result;
        for (int i = 0; i < kItems; i++) narrow(widen(vector.items[i]), result.items[i]);
        return result;
    }
}

// out[t] = vision[vision_index[t]] if vision_index[t] >= 0, else embedding[token_ids[t]].
LYNX_GLOBAL(pack_embeddings_fwd_kernel)
template <class Table, class Vision, int kVectorItems>
struct PackRows : OnePhase {
    LYNX_RUN_BY(pack_embeddings_fwd_kernel, PackRows)
    static constexpr int kItems = kVectorItems, kThreads = 128;
    static constexpr int kLoads = 4;  // of a thread in flight: a block's are a row of 4096 numbers of 16 bits
    static constexpr int kColumns = kThreads * kLoads * kItems;  // of a block

    struct Args {
        const int64_t* token_ids;     // (T,)
        const int32_t* vision_index;  // (T,)
        const Table* embedding;       // (V, d)
        const Vision* vision;         // (M, d)
        Table* out;                   // (T, d)
        int64_t num_embeddings, num_vision, embedding_stride, vision_stride;  // strides of rows, in elements
        int width, blocks_of_a_row;
    };

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared&, Registers&) {
        const int64_t row = place.block / args.blocks_of_a_row;
        const int first = place.block % args.blocks_of_a_row * kColumns + place.thread * kItems;
        Table* out = args.out + row * args.width;
        const int64_t vision_row = args.vision_index[row];
        if (vision_row >= 0) {
            assert(vision_row < args.num_vision && "pack_embeddings: a vision_index is out of range");
            copy(args.vision + vision_row * args.vision_stride, out, first, args.width);
        } else {
            const int64_t token = args.token_ids[row];
            assert(0 <= token && token < args.num_embeddings && "pack_embeddings: a token id is out of range");
            copy(args.embedding + token * args.embedding_stride, out, first, args.width);
        }
    }

   private:
    template <class From>
    LYNX_PORTABLE static void copy(const From* from, Table* to, int first, int width) {
        AlignedVector<From, kItems> loads[kLoads];
        LYNX_UNROLL
        for (int i = 0; i < kLoads; i++) {
            const int column = first + i * kThreads * kItems;
            if (column < width) loads[i] = load<From, kItems>(from + column);
        }
        LYNX_UNROLL
        for (int i = 0; i < kLoads; i++) {
            const int column = first + i * kThreads * kItems;
            if (column < width) store(to + column, convert<Table>(loads[i]));
        }
    }
};

// The first and the last row that each vision row was copied to, as T - first and last + 1. An unused vision row keeps
// 0. The order of the atomics changes nothing, because these are integers.
LYNX_GLOBAL(pack_embeddings_bwd_find_uses_kernel)
struct FindUses : OnePhase {
    LYNX_RUN_BY(pack_embeddings_bwd_find_uses_kernel, FindUses)
    static constexpr int kThreads = 256;

    struct Args {
        const int32_t* vision_index;  // (T,)
        int32_t* uses;                // (2, M), zeros before
        int num_rows, num_vision;
    };

    template <int kPhase>
    LYNX_PORTABLE static void phase(const Args& args, const Place& place, Shared&, Registers&) {
        const int64_t row = static_cast<int64_t>(place.block) * kThreads + place.thread;
        if (row >= args.num_rows) return;
        const int vision_row = args.vision_index[row];
        if (vision_row < 0) return;
        assert(vision_row < args.num_vision && "pack_embeddings_backward: a vision_index is out of range");
        atomic_max(args.uses + vision_row, args.num_rows - static_cast<int>(row));
        atomic_max(args.uses + args.num_vision + vision_row, static_cast<int>(row) + 1);
    }
};

// grad_vision[m] = the sum of grad[t] over the rows t with vision_index[t] = m, in fp32 and in the order of t.
//
// A block has some columns of one vision row. It goes through the rows from the first use to the last, kThreads rows a
// round. The threads find which of these rows are uses, then each adds its own columns of them.
LYNX_GLOBAL(pack_embeddings_bwd_sum_kernel)
template <class Table, class Vision, int kVectorItems>
struct SumRows {
    LYNX_RUN_BY(pack_embeddings_bwd_sum_kernel, SumRows)
    static constexpr int kItems = kVectorItems, kThreads = 128, kPhases = 2;
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
        const int vision_row = place.block / args.blocks_of_a_row, last = last_use(args, place.block);
        const int first = first_use(args, place.block) + place.round * kThreads;  // of this round
        if constexpr (kPhase == 0) {
            const int row = first + place.thread;
            shared.is_use[place.thread] = row <= last && args.vision_index[row] == vision_row;
        } else {
            const int column = place.block % args.blocks_of_a_row * kColumns + place.thread * kItems;
            if (column >= args.width) return;
            for (int i = 0; i < kThreads && first + i <= last; i++)
                if (shared.is_use[i]) add(args.grad + (first + i) * args.grad_stride + column, registers);
            if (last - first >= kThreads) return;  // there is another round
            AlignedVector<Vision, kItems> sums;
            for (int i = 0; i < kItems; i++) narrow(registers.sums[i], sums.items[i]);
            store(args.out + static_cast<int64_t>(vision_row) * args.width + column, sums);
        }
    }

   private:
    LYNX_PORTABLE static int first_use(const Args& args, int block) {
        return args.num_rows - args.uses[block / args.blocks_of_a_row];  // T if there is none
    }

    LYNX_PORTABLE static int last_use(const Args& args, int block) {
        const int64_t num_vision = args.num_vision;  // twice as many may be more than an int holds
        return args.uses[num_vision + block / args.blocks_of_a_row] - 1;  // -1 if there is none
    }

    LYNX_PORTABLE static void add(const Table* row, Registers& registers) {
        const AlignedVector<Table, kItems> vector = load<Table, kItems>(row);
        for (int i = 0; i < kItems; i++) registers.sums[i] += widen(vector.items[i]);
    }
};

}  // namespace lynx::embeddings
