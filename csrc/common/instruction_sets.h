// The instruction sets that kernels are compiled for, and the one in use.
//
// LYNX_INSTRUCTION_SETS, from the build, is a list of them, the preferred ones first: LYNX_INSTRUCTION_SETS(X, ...) is
// X(avx2, ...) X(plain, ...) and so on.
#pragma once

#include <string>
#include <vector>

namespace lynx {

// The names of those this CPU has, the best first. The last one is "plain", which every CPU has.
std::vector<std::string> instruction_sets();

// The one in use, as its place in LYNX_INSTRUCTION_SETS and by name: the best one, unless another one was forced.
int instruction_set();
std::string instruction_set_name();

// Use this one from now on, or the best one if the name is empty. Throws std::invalid_argument if the CPU lacks it.
void force_instruction_set(const std::string& name);

}  // namespace lynx

// Declares an operation's kernels of every instruction set, and kernels(): those of the one in use.
#define LYNX_CHOOSE_KERNELS(Kernels, operation)                                                                \
    LYNX_INSTRUCTION_SETS(LYNX_DECLARE_KERNELS, Kernels, operation)                                            \
    static const Kernels& kernels() {                                                                          \
        static const Kernels* const all[] = {LYNX_INSTRUCTION_SETS(LYNX_ADDRESS_OF_KERNELS, Kernels, operation)}; \
        return *all[instruction_set()];                                                                        \
    }
#define LYNX_DECLARE_KERNELS(name, Kernels, operation) extern const Kernels operation##_##name;
#define LYNX_ADDRESS_OF_KERNELS(name, Kernels, operation) &operation##_##name,
