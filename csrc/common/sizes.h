// Sizes that a CUDA kernel counts in ints.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace lynx {

// `size` as an int. Throws std::invalid_argument unless it has at most so many bits.
inline int int_size(const char* operation, const char* what, int64_t size, int bits) {
    if (size >> bits != 0)
        throw std::invalid_argument(std::string(operation) + ": " + what + " is " + std::to_string(size) +
                                    ", and the CUDA kernels take less than 2^" + std::to_string(bits));
    return static_cast<int>(size);
}

}  // namespace lynx
