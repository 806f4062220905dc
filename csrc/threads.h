// How many threads a parallel region may use.
#pragma once

namespace lynx {

// To be called once, when the module is loaded.
void watch_forks();

// `wanted`, or 1 in a process that was forked from one that had loaded this module: OpenMP's threads do not survive a
// fork, and a child that waits for them hangs.
int usable_threads(int wanted);

}  // namespace lynx
