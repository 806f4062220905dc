// Attention of the newest tokens of many branches over a cache in which the keys of a root stand once.
#pragma once

#include "problem.h"

namespace lynx::decode {

// Results do not depend on `threads`. Throws std::invalid_argument if an index or a length is out of range.
void forward(Problem problem, int threads);

}  // namespace lynx::decode
