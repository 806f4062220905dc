#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <vector>

#include "memory.h"

namespace lynx {
namespace {

bool is_forked = false;

}  // namespace

void watch_forks() {
    pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
}

int usable_threads(int wanted) { return is_forked || wanted < 1 ? 1 : wanted; }

void share_out(int64_t count, int threads, size_t scratch_bytes, const std::function<void(int64_t, void*)>& work) {
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
        for (int64_t i = 0; i < count; i++) work(i, scratch);
    }
}

}  // namespace lynx
