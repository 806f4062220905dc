// Which kernels a call of prefix_attention_decode launches. The caller runs each by `run(Kernel(), args, blocks)`.
#pragma once

#include <algorithm>

#include "common/integers.h"
#include "common/sizes.h"
#include "kernels.h"

namespace lynx::decode {

// `problem` says everything but how the work is cut, and where splits write. The caches have one dtype, and their rows
// start at multiples of 16 bytes. D is a multiple of 8, at most 128.
struct Call {
    Problem problem;
    Dtype cache_dtype;
    double scale;  // of the scores
    void* out;     // (B, Q, H, D), in the type of q
    float* lse;    // (B, Q, H)
    int multiprocessors;
};

// Kernels compute key numbers behind the last key, so sizes stay below half of what an int holds.
inline int checked_size(const char* what, int64_t size) { return int_size("prefix_attention_decode", what, size, 30); }

// How many splits keys are cut into, if there is room for `capacity` keys and each split takes `blocks` blocks: as many
// as fit on the GPU at once, but each split has at least one tile.
inline int num_splits(int64_t capacity, int block_n, int64_t blocks, int64_t fitting) {
    if (capacity == 0) return 0;
    const int64_t tiles = divide_up(capacity, block_n);
    const int64_t each = divide_up(tiles, std::max<int64_t>(1, fitting / blocks));
    return static_cast<int>(divide_up(tiles, each));
}

// The problem, cut for `Kernel`.
template <class Kernel>
Problem cut(Problem problem, int multiprocessors) {
    const int rows = problem.queries * (problem.heads / problem.kv_heads);
    problem.tile_branches = std::max(1, Kernel::kBlockM / rows);
    problem.m_tiles = static_cast<int>(divide_up(rows, Kernel::kBlockM));
    const int64_t branches = problem.branches, full_tiles = divide_up(branches, problem.tile_branches);
    const int64_t fitting = static_cast<int64_t>(Kernel::kBlocks) * multiprocessors;
    const int64_t tiles = static_cast<int64_t>(problem.m_tiles) * problem.kv_heads;
    // How many branches share a range is known on the device only. Splits suit a range that all branches read.
    problem.range_splits = num_splits(problem.ranges_of_branch > 0 ? problem.num_shared : 0, Kernel::kBlockN,
                                      full_tiles * tiles * problem.ranges_of_branch, fitting);
    problem.branch_splits = num_splits(problem.branch_capacity, Kernel::kBlockN, branches * tiles, fitting);
    return problem;
}

// Calls use(Kernel<Element, kDim, kBlockM>()).
template <template <class, int, int> class Kernel, class Element, int kDim, class Use>
void with_block_m(int64_t rows, Use use) {
    if (rows <= 1)
        use(Kernel<Element, kDim, 1>());
    else if (rows <= 4)
        use(Kernel<Element, kDim, 4>());
    else
        use(Kernel<Element, kDim, 8>());
}

// B, Q, H and D are not 0, and branches have room for a key. `allocate(count)` gives memory for so many floats, which
// lasts as long as the kernels run.
template <class Run, class Allocate>
void forward(const Call& call, Run&& run, Allocate allocate) {
    const Problem& given = call.problem;
    const int64_t all_rows = static_cast<int64_t>(given.branches) * given.queries * given.heads;
    const int64_t rows = all_rows / given.kv_heads;  // of a range that all branches read
    with_type(call.cache_dtype, [&](auto element) {
        using Element = decltype(element);
        auto launch = [&](auto kernel) {
            using Kernel = decltype(kernel);
            Problem problem = cut<Kernel>(given, call.multiprocessors);
            problem.scale = static_cast<float>(call.scale * 1.4426950408889634);  // log2(e)
            const int64_t num_splits = problem.ranges_of_branch * problem.range_splits + problem.branch_splits;
            problem.outs = allocate(num_splits * all_rows * (problem.dim + 1));
            problem.lses = problem.outs + num_splits * all_rows * problem.dim;
            const int64_t blocks = num_splits * problem.kv_heads * problem.branches * problem.m_tiles;
            run(kernel, problem, checked_size("the number of blocks", blocks));
            const int64_t threads = all_rows * (problem.dim / Combine::kItems);
            run(Combine(),
                Combine::Args{problem.outs, problem.lses, call.out, problem.q.dtype, call.lse,
                              static_cast<int>(num_splits), problem.dim, all_rows},
                checked_size("the number of blocks", divide_up(threads, Combine::kThreads)));
        };
        if (given.dim <= 64)
            with_block_m<Attend, Element, 64>(rows, launch);
        else
            with_block_m<Attend, Element, 128>(rows, launch);
    });
}

}  // namespace lynx::decode
