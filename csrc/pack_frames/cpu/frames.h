// From frames to normalised patches, on several threads.
#pragma once

#include "problem.h"

namespace lynx::frames {

// Results do not depend on `threads`.
void pack_frames(const Problem& problem, int threads);

}  // namespace lynx::frames
