// A CUDA kernel as phases between barriers. A GPU runs the same source that tests run on a CPU, thread by thread.
//
// A kernel is a struct with
//
//     Args          what every thread is given: pointers and sizes
//     kThreads      threads of a block
//     kBlocks       blocks that a multiprocessor's registers must have room for; may be absent
//     kPhases       phases of a round; a barrier follows each of them
//     Shared        a block's shared memory, uninitialised at first
//     Registers     what a thread keeps from phase to phase, zeros at first
//     rounds        rounds(args, block): how often the block runs its phases, at least once
//     phase         phase<P>(args, place, shared, registers): what one thread does in phase P
//
// and the name that a profiler shows, by LYNX_GLOBAL(name) in front of the struct and LYNX_RUN_BY(name, Struct) in it.
//
// Threads run in any order between two barriers. So a phase may read of Shared only what an earlier phase wrote, or
// what its own thread wrote. Phases cannot use what needs all threads of a warp at once (shuffles, tensor cores).
#pragma once

#include <type_traits>

#include "portable.h"

namespace lynx {

struct Place {
    int block, thread, round;
};

struct Nothing {};

// The base of a kernel of one phase.
struct OnePhase {
    static constexpr int kPhases = 1;
    using Shared = Nothing;
    using Registers = Nothing;

    template <class Args>
    LYNX_PORTABLE static int rounds(const Args&, int) {
        return 1;
    }
};

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
    // Where registers are short, every phase computes anew what follows from the thread's number. Kept from phase to
    // phase, it would take the registers that loads in flight need.
    if constexpr (BlocksOf<Kernel>::kValue > 0) asm volatile("" : "+r"(here.thread));
    Kernel::template phase<kPhase>(args, here, shared, registers);
    if constexpr (kPhase + 1 < Kernel::kPhases) {
        __syncthreads();
        run_phases<Kernel, kPhase + 1>(args, place, shared, registers);
    }
}

template <class Kernel>
__device__ __forceinline__ void run_block(const typename Kernel::Args& args) {
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

#define LYNX_GLOBAL(name)                                                         \
    template <class Kernel>                                                       \
    __global__ void __launch_bounds__(Kernel::kThreads, BlocksOf<Kernel>::kValue) \
    name(const __grid_constant__ typename Kernel::Args args) {                    \
        run_block<Kernel>(args);                                                  \
    }
#define LYNX_RUN_BY(kernel_name, Struct)                         \
    static auto global() { return &kernel_name<Struct>; }        \
    static const char* name() { return #kernel_name; }

#else

#define LYNX_GLOBAL(name)
#define LYNX_RUN_BY(name, Struct)

#endif

// Two threads of a phase may call it for the same address: of integers the order changes nothing.
LYNX_PORTABLE void atomic_max(int* largest, int value) {
#if defined(__CUDA_ARCH__)
    atomicMax(largest, value);
#else
    if (value > *largest) *largest = value;
#endif
}

}  // namespace lynx
