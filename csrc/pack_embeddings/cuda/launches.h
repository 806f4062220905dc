// Which kernels a call of pack_embeddings takes, for whoever runs them: `run(Kernel(), args, blocks)`.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "pack_embeddings/rows.h"

namespace lynx {

inline int narrow_size(const char* what, int64_t size) {
    if (size > std::numeric_limits<int>::max())
        throw std::invalid_argument(std::string("pack_embeddings: ") + what + " is " + std::to_string(size) +
                                    ", and the CUDA kernels take less than 2^31");
    return static_cast<int>(size);
}

// Whether every row of `width` elements starts and ends at a multiple of 16 bytes, so that packs can be moved.
template <class Element>
bool takes_packs(const Rows& rows, int64_t width) {
    const int64_t per_pack = 16 / sizeof(Element);
    return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride % per_pack == 0 && width % per_pack == 0;
}

// Call `use` with the kernel that `Kernel<First, Second, kItems>` is for these rows.
template <template <class, class, int> class Kernel, class First, class Second, class Use>
void with_widest(bool packs, Use use) {
    if (packs)
        use(Kernel<First, Second, items_of_a_pack<First, Second>()>());
    else
        use(Kernel<First, Second, 1>());
}

template <class Kernel>
int blocks_of_a_row(int64_t width) {
    return static_cast<int>((width + Kernel::kColumns - 1) / Kernel::kColumns);
}

template <class Run>
void pack_rows(const int64_t* token_ids, const int32_t* vision_index, const Rows& embedding, const Rows& vision,
               const Rows& out, int64_t width, Run run) {
    if (out.count == 0 || width == 0) return;
    with_type(embedding.dtype, [&](auto table_type) {
        with_type(vision.dtype, [&](auto vision_type) {
            using Table = decltype(table_type);
            using Vision = decltype(vision_type);
            const bool packs = takes_packs<Table>(embedding, width) && takes_packs<Vision>(vision, width) &&
                               takes_packs<Table>(out, width);
            with_widest<PackRows, Table, Vision>(packs, [&](auto kernel) {
                using Kernel = decltype(kernel);
                const int blocks = blocks_of_a_row<Kernel>(width);
                typename Kernel::Args args = {
                    token_ids, vision_index, static_cast<const Table*>(embedding.data),
                    static_cast<const Vision*>(vision.data), static_cast<Table*>(out.data), embedding.count,
                    vision.count, embedding.stride, vision.stride, narrow_size("the width", width), blocks};
                run(kernel, args, narrow_size("rows times blocks of a row", out.count * blocks));
            });
        });
    });
}

// `uses` are 2 M zeros.
template <class Run>
void sum_rows(const Rows& grad, const int32_t* vision_index, int32_t* uses, const Rows& out, int64_t width, Run run) {
    if (out.count == 0 || width == 0) return;
    const int num_rows = narrow_size("the number of rows", grad.count);
    const int num_vision = narrow_size("the number of vision rows", out.count);
    const int64_t find_blocks = (grad.count + FindUses::kThreads - 1) / FindUses::kThreads;
    if (find_blocks > 0)
        run(FindUses(), FindUses::Args{vision_index, uses, num_rows, num_vision}, static_cast<int>(find_blocks));
    with_type(grad.dtype, [&](auto table_type) {
        with_type(out.dtype, [&](auto vision_type) {
            using Table = decltype(table_type);
            using Vision = decltype(vision_type);
            const bool packs = takes_packs<Table>(grad, width) && takes_packs<Vision>(out, width);
            with_widest<SumRows, Table, Vision>(packs, [&](auto kernel) {
                using Kernel = decltype(kernel);
                const int blocks = blocks_of_a_row<Kernel>(width);
                typename Kernel::Args args = {
                    static_cast<const Table*>(grad.data), vision_index, uses, static_cast<Vision*>(out.data),
                    grad.stride, num_rows, num_vision, narrow_size("the width", width), blocks};
                run(kernel, args, narrow_size("vision rows times blocks of a row", out.count * blocks));
            });
        });
    });
}

}  // namespace lynx
