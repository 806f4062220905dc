// The instruction sets that kernels are compiled for, and the one that runs.
#pragma once

#include <string>
#include <vector>

namespace lynx {

// In the order in which they are preferred. LYNX_INSTRUCTION_SETS, from the build, is the list `X(AVX2, avx2) ...` of
// those that the kernels were compiled for.
enum class InstructionSet {
#define X(constant, name) constant,
    LYNX_INSTRUCTION_SETS
#undef X
};

// Names of those this processor has, best first; "plain" is the last and needs nothing.
std::vector<std::string> instruction_sets();

// The one in use: the best, or the one that was forced.
InstructionSet instruction_set();
std::string instruction_set_name();

// Use this one from now on, the best again with an empty name. Throws std::invalid_argument if the processor lacks it.
void force_instruction_set(const std::string& name);

}  // namespace lynx
