// fuzz SECONDS [SEED]: random calls for so long, one after another; with a seed only that one.
#include "fuzz.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>

int main(int count, char** arguments) {
    const double seconds = count > 1 ? atof(arguments[1]) : 60;
    if (count > 2) {
        fuzz_adapter(strtoull(arguments[2], nullptr, 10));
        fuzz_frames(strtoull(arguments[2], nullptr, 10));
        fuzz_attention(strtoull(arguments[2], nullptr, 10));
        fuzz_decode(strtoull(arguments[2], nullptr, 10));
        fuzz_embeddings(strtoull(arguments[2], nullptr, 10));
        return 0;
    }
    const auto start = std::chrono::steady_clock::now();
    const uint64_t first = std::random_device()();
    uint64_t seed = first;
    for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; seed++) {
        // Printed before the call, which a sanitizer may end: the last line of the output says what to run again.
        printf("\rseed %llu", static_cast<unsigned long long>(seed));
        fflush(stdout);
        fuzz_adapter(seed);
        fuzz_frames(seed);
        fuzz_attention(seed);
        fuzz_decode(seed);
        fuzz_embeddings(seed);
    }
    printf("\r%llu random calls of every entry point and instruction set: nothing found\n",
           static_cast<unsigned long long>(seed - first));
}
