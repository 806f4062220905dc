// Evens out the patches of a step's packs.
#pragma once

#include <vector>

#include "planner.h"

namespace lynx {

// Swaps samples between packs; sorts the samples of each.
void balance(std::vector<Pack>& packs);

}  // namespace lynx
