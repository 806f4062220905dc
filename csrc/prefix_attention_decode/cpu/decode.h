// Attention of the newest tokens of many branches over a cache in which shared keys stand once.
#pragma once

#include "problem.h"

namespace lynx::decode {

// Results do not depend on `threads`. Throws std::invalid_argument if a range or a length is out of range.
void forward(Problem problem, int threads);

}  // namespace lynx::decode
