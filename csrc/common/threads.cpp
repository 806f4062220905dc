#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <vector>

#include "memory.h"

namespace lynx {
namespace {

constexpr int64_t kBytesOfAThread = 64 << 10;

bool is_forked = false;

}  // namespace

void watch_forks() {
    pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
}

int usable_threads(int wanted) { return is_forked || wanted < 1 ? 1 : wanted; }

int threads_for_bytes(int64_t bytes, int wanted) {
    return static_cast<int>(std::min<int64_t>(usable_threads(wanted), 1 + bytes / kBytesOfAThread));
}

void parallel_for(int64_t count, int threads, size_t scratch_bytes, const std::function<void(int64_t, void*)>& body) {
    if (count == 0) return;
    threads = static_cast<int>(std::min<int64_t>(usable_threads(threads), count));
    std::vector<Memory> scratches;
    for (int i = 0; i < threads; i++) scratches.push_back(allocate(scratch_bytes));
    int next_scratch = 0;
#pragma omp parallel num_threads(threads)
    {
        int mine;
#pragma omp atomic capture
        mine = next_scratch++;
        void* scratch = scratches[mine].get();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) body(i, scratch);
    }
}

}  // namespace lynx
