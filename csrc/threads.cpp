#include "threads.h"

#include <pthread.h>

namespace lynx {
namespace {

bool is_forked = false;

}  // namespace

void watch_forks() {
    pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
}

int usable_threads(int wanted) { return is_forked || wanted < 1 ? 1 : wanted; }

}  // namespace lynx
