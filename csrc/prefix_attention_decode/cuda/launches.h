// Which kernels a call of prefix_attention_decode takes, for whoever runs them: `run(Kernel(), args, blocks)`.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace lynx::decode {

// `problem` says all but how the work is cut and where parts go. Rows of the caches, of one dtype, start at multiples of
// 16 bytes; D is a multiple of 8, at most 128.
struct Call {
    Problem problem;
    Dtype cache_dtype;
    double scale;  // of the scores
    void* out;     // (B, Q, H, D), in the type of q
    float* lse;    // (B, Q, H)
    int multiprocessors;
};

inline int narrow_size(const char* what, int64_t size) {
    if (size > std::numeric_limits<int>::max() / 2)  // keys are counted on behind their end
        throw std::invalid_argument(std::string("prefix_attention_decode: ") + what + " is " + std::to_string(size) +
                                    ", and the CUDA kernels take less than 2^30");
    return static_cast<int>(size);
}

// How many parts keys, of which there is room for `capacity`, are cut into, for `blocks` blocks on each: as many as fit
// on the GPU at once, and none that could not have a chunk of its own.
inline int count_parts(int64_t capacity, int chunk, int64_t blocks, int64_t fitting) {
    if (capacity == 0) return 0;
    const int64_t chunks = (capacity + chunk - 1) / chunk;
    const int64_t wanted = std::max<int64_t>(1, fitting / blocks);
    const int64_t each = (chunks + wanted - 1) / wanted;
    return static_cast<int>((chunks + each - 1) / each);
}

// The problem as `Kernel` is to solve it.
template <class Kernel>
Problem cut(Problem problem, int tile_rows, int multiprocessors) {
    const int rows = problem.queries * (problem.heads / problem.kv_heads);
    problem.slots = std::max(1, tile_rows / rows);
    problem.row_tiles = (rows + tile_rows - 1) / tile_rows;
    const int64_t branches = problem.branches, of_slots = (branches + problem.slots - 1) / problem.slots;
    const int64_t fitting = static_cast<int64_t>(Kernel::kBlocks) * multiprocessors;
    // Those that work: over roots at least one for each of their groups of branches.
    const int64_t on_roots = std::min(branches, std::max<int64_t>(problem.roots, of_slots));
    const int64_t tiles = static_cast<int64_t>(problem.row_tiles) * problem.kv_heads;
    problem.root_parts = count_parts(problem.root_capacity, Kernel::kChunk, on_roots * tiles, fitting);
    problem.branch_parts = count_parts(problem.branch_capacity, Kernel::kChunk, branches * tiles, fitting);
    return problem;
}

template <template <class, int, int> class Kernel, class Element, int kDim, class Use>
void with_rows(int64_t rows, Use use) {
    if (rows <= 1)
        use(Kernel<Element, kDim, 1>(), 1);
    else if (rows <= 4)
        use(Kernel<Element, kDim, 4>(), 4);
    else
        use(Kernel<Element, kDim, 8>(), 8);
}

// Neither B, Q, H nor D is 0, and branches have room for a key. `allocate(count)` gives memory for so many floats, for
// as long as the kernels run.
template <class Run, class Allocate>
void attend(const Call& call, Run&& run, Allocate allocate) {
    const Problem& given = call.problem;
    const int64_t roots = std::max(1, given.roots), per_root = (given.branches + roots - 1) / roots;
    const int64_t rows = per_root * given.queries * (given.heads / given.kv_heads);  // of a root, on average
    const int64_t all_rows = static_cast<int64_t>(given.branches) * given.queries * given.heads;
    with_type(call.cache_dtype, [&](auto element) {
        using Element = decltype(element);
        auto launch = [&](auto kernel, int tile_rows) {
            using Kernel = decltype(kernel);
            Problem problem = cut<Kernel>(given, tile_rows, call.multiprocessors);
            problem.scale = static_cast<float>(call.scale * 1.4426950408889634);  // log2(e)
            const int64_t parts = problem.root_parts + problem.branch_parts;
            problem.outs = allocate(parts * all_rows * (problem.dim + 1));
            problem.lses = problem.outs + parts * all_rows * problem.dim;
            const int64_t blocks = parts * problem.kv_heads * problem.branches * problem.row_tiles;
            run(kernel, problem, narrow_size("the number of blocks", blocks));
            const int64_t threads = all_rows * (problem.dim / Merge::kItems);
            run(Merge(),
                Merge::Args{problem.outs, problem.lses, call.out, problem.q.dtype, call.lse, static_cast<int>(parts),
                            problem.dim, all_rows},
                narrow_size("the number of blocks", (threads + Merge::kThreads - 1) / Merge::kThreads));
        };
        if (given.dim <= 64)
            with_rows<Attend, Element, 64>(rows, launch);
        else
            with_rows<Attend, Element, 128>(rows, launch);
    });
}

}  // namespace lynx::decode
