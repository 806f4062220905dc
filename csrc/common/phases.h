// A CUDA kernel as phases between barriers: one source that a GPU runs, and a test on a CPU, thread by thread.
//
// A kernel is a struct with
//
//     Args          what every thread is given: pointers and sizes
//     kThreads      threads of a block
//     kBlocks       blocks that a multiprocessor's registers shall have room for; may be absent
//     kPhases       phases of a round; after each there is a barrier
//     Shared        a block's shared memory, garbage at first
//     Registers     what a thread keeps from phase to phase, zeros at first
//     rounds        rounds(args, block): how often the block goes through its phases, at least once
//     phase         phase<P>(args, place, shared, registers): what one thread does in phase P
//
// Between two barriers threads run in any order, so a phase may read of Shared only what earlier phases wrote, or what
// its own thread did. Whatever needs the threads of a warp at once (shuffles, tensor cores) has no place in a phase.
#pragma once

#include <type_traits>

#include "portable.h"

namespace lynx {

struct Place {
    int block, thread, round;
};

struct Nothing {};

template <class Kernel, class = void>
struct BlocksOf {
    static constexpr int kValue = 0;
};

template <class Kernel>
struct BlocksOf<Kernel, std::void_t<decltype(Kernel::kBlocks)>> {
    static constexpr int kValue = Kernel::kBlocks;
};

#if defined(__CUDACC__)

template <class Kernel, int kPhase>
__device__ __forceinline__ void run_phases(const typename Kernel::Args& args, const Place& place,
                                           typename Kernel::Shared& shared, typename Kernel::Registers& registers) {
    Place here = place;
    // Where registers are short, a phase computes what follows from the thread anew in every round: all of it kept would
    // take those that loads on their way need.
    if constexpr (BlocksOf<Kernel>::kValue > 0) asm volatile("" : "+r"(here.thread));
    Kernel::template phase<kPhase>(args, here, shared, registers);
    if constexpr (kPhase + 1 < Kernel::kPhases) {
        __syncthreads();
        run_phases<Kernel, kPhase + 1>(args, place, shared, registers);
    }
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, BlocksOf<Kernel>::kValue)
run_kernel(const __grid_constant__ typename Kernel::Args args) {
    __shared__ typename Kernel::Shared shared;
    typename Kernel::Registers registers = {};
    Place place = {static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x), 0};
    const int rounds = Kernel::rounds(args, place.block);
    for (;;) {
        run_phases<Kernel, 0>(args, place, shared, registers);
        if (++place.round >= rounds) return;
        __syncthreads();
    }
}

#endif

// Between phases it would be a race; integers only, where the order of the threads changes nothing.
LYNX_PORTABLE void atomic_max(int* largest, int value) {
#if defined(__CUDA_ARCH__)
    atomicMax(largest, value);
#else
    if (value > *largest) *largest = value;
#endif
}

}  // namespace lynx
