#include "adapter.h"

#include <omp.h>

#include <algorithm>

#include "../instruction_sets.h"
#include "../memory.h"
#include "../threads.h"

namespace lynx {

#define X(constant, name) extern const AdapterKernels adapter_##name;
LYNX_INSTRUCTION_SETS
#undef X

namespace {

const AdapterKernels& kernels() {
    static const AdapterKernels* const all[] = {
#define X(constant, name) &adapter_##name,
        LYNX_INSTRUCTION_SETS
#undef X
    };
    return *all[static_cast<int>(instruction_set())];
}

int64_t divide_up(int64_t size, int64_t part) { return (size + part - 1) / part; }

}  // namespace

void adapter_forward(Adapter adapter, int threads) {
    if (adapter.tokens == 0) return;
    adapter.normalized_stride = divide_up(adapter.width, kRowMultiple) * kRowMultiple;
    adapter.activated_stride = divide_up(adapter.bottleneck, kRowMultiple) * kRowMultiple;
    const int64_t normalized_bytes = adapter.tokens * adapter.normalized_stride * sizeof(float);
    const int64_t activated_bytes = adapter.tokens * adapter.activated_stride * sizeof(float);
    const Memory operands = allocate(normalized_bytes + activated_bytes);
    adapter.normalized = operands.get();
    adapter.activated = operands.get() + normalized_bytes;

    const AdapterKernels& run = kernels();
    const int64_t down_blocks = divide_up(adapter.bottleneck, kBlockColumns);
    const int64_t up_blocks = divide_up(adapter.width, kBlockColumns);
    threads = static_cast<int>(std::min<int64_t>(usable_threads(threads), std::max(down_blocks, up_blocks)));
#pragma omp parallel num_threads(threads)
    {
        const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();  // may be fewer than asked for
        const auto cut = [&](int64_t count, int64_t at) { return count * at / parts; };
        run.normalize(adapter, cut(adapter.tokens, part), cut(adapter.tokens, part + 1));
#pragma omp barrier
        run.down(adapter, cut(down_blocks, part), cut(down_blocks, part + 1), cut(up_blocks, part));
#pragma omp barrier
        run.up(adapter, cut(up_blocks, part), cut(up_blocks, part + 1));
    }
}

}  // namespace lynx
