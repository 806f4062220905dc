// Random calls of the C++ entry points, for builds with sanitizers. Each function makes one call for every instruction
// set. All its numbers follow from `seed`. If a result is wrong, it exits with a message.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

class Random {
   public:
    explicit Random(uint64_t seed) : engine_(seed) {}

    // From `least` to `most`, both included.
    int64_t number(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(engine_); }

    bool flag() { return number(0, 1) == 1; }

   private:
    std::mt19937_64 engine_;
};

// `where` is the operation or the instruction set.
[[noreturn]] inline void fail(const std::string& where, const char* what) {
    printf("\n%s: %s\n", where.c_str(), what);
    exit(1);
}

void fuzz_adapter(uint64_t seed);
void fuzz_attention(uint64_t seed);
void fuzz_decode(uint64_t seed);
void fuzz_embeddings(uint64_t seed);
void fuzz_frames(uint64_t seed);
