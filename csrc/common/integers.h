// Integer arithmetic that sizes and launches need.
#pragma once

#include <cstdint>

#include "portable.h"

namespace lynx {
namespace {  // unnamed: vector.h says why

LYNX_PORTABLE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

LYNX_PORTABLE int64_t divide_up(int64_t size, int64_t divisor) { return (size + divisor - 1) / divisor; }

LYNX_PORTABLE int64_t round_up(int64_t size, int64_t multiple) { return divide_up(size, multiple) * multiple; }

}  // namespace
}  // namespace lynx
