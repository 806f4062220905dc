#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace lynx {
namespace {

bool is_forked = false;

struct Free {
    void operator()(void* block) const { free(block); }
};

}  // namespace

void watch_forks() {
    pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
}

int usable_threads(int wanted) { return is_forked || wanted < 1 ? 1 : wanted; }

void share_out(int64_t count, int threads, size_t scratch_bytes, const std::function<void(int64_t, void*)>& work) {
    if (count == 0) return;
    threads = static_cast<int>(std::min<int64_t>(usable_threads(threads), count));
    // Before the threads start: no exception may leave them.
    std::vector<std::unique_ptr<void, Free>> scratches;
    const size_t bytes = (scratch_bytes + 64) / 64 * 64;
    for (int i = 0; i < threads; i++) {
        scratches.emplace_back(aligned_alloc(64, bytes));
        if (scratches.back() == nullptr) throw std::bad_alloc();
    }
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
