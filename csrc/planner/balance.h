// Evens out the patches of a step's packs.
#pragma once

#include <vector>

#include "planner.h"

namespace lynx {

struct Pack {
    int64_t room;     // tokens that are left of the budget
    int64_t patches;  // of all samples
    std::vector<Sample> samples;
};

// Swaps samples between packs; sorts the samples of each.
void balance(std::vector<Pack>& packs);

}  // namespace lynx
