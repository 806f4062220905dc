// Attention of the newest tokens of many branches to a cache in which a root's keys stand once.
#pragma once

#include "problem.h"

namespace lynx {

// Results do not depend on `threads`. Throws std::invalid_argument for an index or a length out of range.
void decode(DecodeProblem problem, int threads);

}  // namespace lynx
