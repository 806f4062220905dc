// Which kernels a call of pack_embeddings launches. The caller runs each by `run(Kernel(), args, blocks)`.
#pragma once

#include "common/integers.h"
#include "common/sizes.h"
#include "kernels.h"
#include "pack_embeddings/rows.h"

namespace lynx::embeddings {

inline int checked_size(const char* what, int64_t size) { return int_size("pack_embeddings", what, size, 31); }

// Whether every row of `width` elements starts and ends at a multiple of 16 bytes.
template <class Element>
bool is_aligned(const Rows& rows, int64_t width) {
    const int64_t items = 16 / sizeof(Element);
    return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride % items == 0 && width % items == 0;
}

// Calls use(Kernel<First, Second, kItems>()).
template <template <class, class, int> class Kernel, class First, class Second, class Use>
void with_items(bool is_aligned, Use use) {
    if (is_aligned)
        use(Kernel<First, Second, items_of_a_vector<First, Second>()>());
    else
        use(Kernel<First, Second, 1>());
}

template <class Kernel>
int blocks_of_a_row(int64_t width) {
    return static_cast<int>(divide_up(width, Kernel::kColumns));
}

template <class Run>
void pack_rows(const int64_t* token_ids, const int32_t* vision_index, const Rows& embedding, const Rows& vision,
               const Rows& out, int64_t width, Run run) {
    if (out.count == 0 || width == 0) return;
    with_type(embedding.dtype, [&](auto table_type) {
        with_type(vision.dtype, [&](auto vision_type) {
            using Table = decltype(table_type);
            using Vision = decltype(vision_type);
            const bool aligned = is_aligned<Table>(embedding, width) && is_aligned<Vision>(vision, width) &&
                                 is_aligned<Table>(out, width);
            with_items<PackRows, Table, Vision>(aligned, [&](auto kernel) {
                using Kernel = decltype(kernel);
                const int blocks = blocks_of_a_row<Kernel>(width);
                typename Kernel::Args args = {
                    token_ids, vision_index, static_cast<const Table*>(embedding.data),
                    static_cast<const Vision*>(vision.data), static_cast<Table*>(out.data), embedding.count,
                    vision.count, embedding.stride, vision.stride, checked_size("the width", width), blocks};
                run(kernel, args, checked_size("rows times blocks of a row", out.count * blocks));
            });
        });
    });
}

// `uses` are (2, M) zeros.
template <class Run>
void sum_rows(const Rows& grad, const int32_t* vision_index, int32_t* uses, const Rows& out, int64_t width, Run run) {
    if (out.count == 0 || width == 0) return;
    const int num_rows = checked_size("the number of rows", grad.count);
    const int num_vision = checked_size("the number of vision rows", out.count);
    const int64_t find_blocks = divide_up(grad.count, FindUses::kThreads);
    if (find_blocks > 0)
        run(FindUses(), FindUses::Args{vision_index, uses, num_rows, num_vision}, static_cast<int>(find_blocks));
    with_type(grad.dtype, [&](auto table_type) {
        with_type(out.dtype, [&](auto vision_type) {
            using Table = decltype(table_type);
            using Vision = decltype(vision_type);
            const bool aligned = is_aligned<Table>(grad, width) && is_aligned<Vision>(out, width);
            with_items<SumRows, Table, Vision>(aligned, [&](auto kernel) {
                using Kernel = decltype(kernel);
                const int blocks = blocks_of_a_row<Kernel>(width);
                typename Kernel::Args args = {
                    static_cast<const Table*>(grad.data), vision_index, uses, static_cast<Vision*>(out.data),
                    grad.stride, num_rows, num_vision, checked_size("the width", width), blocks};
                run(kernel, args, checked_size("vision rows times blocks of a row", out.count * blocks));
            });
        });
    });
}

}  // namespace lynx::embeddings
