// Attention over all units of a plan, on several threads.
#pragma once

#include "plan.h"

namespace lynx {

// Both fill in the plan's part of the problem. Results do not depend on `threads`.
void attention_forward(const Layout& layout, Problem problem, int threads);
void attention_backward(const Layout& layout, Problem problem, int threads);

}  // namespace lynx
