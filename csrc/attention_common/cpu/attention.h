// Attention over all tasks of a plan, on several threads.
#pragma once

#include "plan.h"

namespace lynx::attention {

// The caller leaves `runs`, `tiles` and `dq_splits` of the problem empty. Results do not depend on `threads`.
void forward(const Layout& layout, Problem problem, int threads);
void backward(const Layout& layout, Problem problem, int threads);

}  // namespace lynx::attention
