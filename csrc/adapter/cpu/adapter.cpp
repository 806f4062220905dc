#include "adapter.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "common/instruction_sets.h"
#include "common/memory.h"
#include "common/threads.h"

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

void adapter_renormalize(const LayerNorm& norm, int threads) {
    const AdapterKernels& run = kernels();
    threads = usable_threads(threads);
#pragma omp parallel num_threads(threads)
    {
        const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        run.renormalize(norm, norm.tokens * part / parts, norm.tokens * (part + 1) / parts);
    }
}

void adapter_norm_backward(LayerNorm norm, float* weight_grad, float* bias_grad, int threads) {
    const AdapterKernels& run = kernels();
    const int64_t blocks = divide_up(norm.tokens, kSummedTokens), width = norm.width;
    threads = static_cast<int>(std::min<int64_t>(usable_threads(threads), std::max<int64_t>(blocks, 1)));
    std::vector<float> sums(weight_grad == nullptr && bias_grad == nullptr ? 0 : blocks * 2 * width);
    norm.sums = sums.empty() ? nullptr : sums.data();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks; block++) run.norm_backward(norm, block);
    for (int which = 0; which < 2; which++) {
        float* total = which == 0 ? weight_grad : bias_grad;
        if (total == nullptr) continue;
        std::fill(total, total + width, 0.0f);
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t column = 0; column < width; column++) total[column] += sums[(2 * block + which) * width + column];
    }
}

}  // namespace lynx
