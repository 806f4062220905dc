// fuzz SECONDS [SEED]: random calls for so many seconds, or with a seed only the calls of that seed.
#include "fuzz.h"

#include <chrono>

namespace {

void run(uint64_t seed) {
    for (auto* fuzz : {fuzz_adapter, fuzz_attention, fuzz_decode, fuzz_embeddings, fuzz_frames}) fuzz(seed);
}

}  // namespace

int main(int count, char** arguments) {
    const double seconds = count > 1 ? atof(arguments[1]) : 60;
    if (count > 2) {
        run(strtoull(arguments[2], nullptr, 10));
        return 0;
    }
    const auto start = std::chrono::steady_clock::now();
    const uint64_t first = std::random_device()();
    uint64_t seed = first;
    for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; seed++) {
        // Printed before the call, because a sanitizer may end it. So the last line of the output says what to run
        // again.
        printf("\rseed %llu", static_cast<unsigned long long>(seed));
        fflush(stdout);
        run(seed);
    }
    printf("\r%llu random calls of every entry point and instruction set: nothing found\n",
           static_cast<unsigned long long>(seed - first));
}
