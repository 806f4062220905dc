// Runs CUDA kernels on the CPU: blocks, and the threads of every phase, in random order, with poisoned shared memory.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "common/phases.h"

namespace lynx {

class OnHost {
   public:
    // Of each launch, only the last `last_blocks` blocks run, all by default.
    explicit OnHost(unsigned seed, int last_blocks = std::numeric_limits<int>::max())
        : random_(seed), last_blocks_(last_blocks) {}

    template <class Kernel>
    void operator()(Kernel, const typename Kernel::Args& args, int blocks) {
        const int count = std::min(blocks, last_blocks_);
        for (int block : shuffled(count)) run_block<Kernel>(args, blocks - count + block);
    }

   private:
    template <class Kernel>
    void run_block(const typename Kernel::Args& args, int block) {
        // It has memory of its own, of exactly its size, so that the sanitizer sees every access outside.
        auto shared = std::make_unique<typename Kernel::Shared>();
        memset(static_cast<void*>(shared.get()), 0xff, sizeof *shared);  // NaNs, and invalid bools
        std::vector<typename Kernel::Registers> registers(Kernel::kThreads);
        const int rounds = Kernel::rounds(args, block);
        for (int round = 0; round == 0 || round < rounds; round++)
            run_phases<Kernel, 0>(args, block, round, *shared, registers);
    }

    template <class Kernel, int kPhase>
    void run_phases(const typename Kernel::Args& args, int block, int round, typename Kernel::Shared& shared,
                    std::vector<typename Kernel::Registers>& registers) {
        for (int thread : shuffled(Kernel::kThreads))
            Kernel::template phase<kPhase>(args, Place{block, thread, round}, shared, registers[thread]);
        if constexpr (kPhase + 1 < Kernel::kPhases)
            run_phases<Kernel, kPhase + 1>(args, block, round, shared, registers);
    }

    std::vector<int> shuffled(int count) {
        std::vector<int> order(count);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), random_);
        return order;
    }

    std::mt19937 random_;
    int last_blocks_;
};

}  // namespace lynx
