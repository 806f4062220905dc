// The adapter's forward for a few tokens, on several threads: it reads each weight once.
#pragma once

#include "problem.h"

namespace lynx {

// Allocates the operands itself. Results do not depend on `threads`.
void adapter_forward(Adapter adapter, int threads);

}  // namespace lynx
