// Random calls of the C++ entry points, for builds with sanitizers: each function makes one call for every instruction
// set, from numbers that follow from `seed` alone, and exits with a message where a result is wrong.
#pragma once

#include <cstdint>
#include <random>

class Random {
   public:
    explicit Random(uint64_t seed) : engine_(seed) {}

    // From `least` to `most`, both included.
    int64_t number(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(engine_); }

    bool flag() { return number(0, 1) == 1; }

   private:
    std::mt19937_64 engine_;
};

void fuzz_adapter(uint64_t seed);
void fuzz_frames(uint64_t seed);
void fuzz_attention(uint64_t seed);
void fuzz_decode(uint64_t seed);
void fuzz_embeddings(uint64_t seed);
