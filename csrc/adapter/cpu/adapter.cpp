#include "adapter.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "common/instruction_sets.h"
#include "common/integers.h"
#include "common/memory.h"
#include "common/threads.h"

namespace lynx::adapter {

LYNX_CHOOSE_KERNELS(Kernels, adapter)

void forward(Problem problem, int threads) {
    if (problem.tokens == 0) return;
    problem.normalized_stride = round_up(problem.width, kRowMultiple);
    problem.activated_stride = round_up(problem.bottleneck, kRowMultiple);
    const int64_t normalized_bytes = problem.tokens * problem.normalized_stride * sizeof(float);
    const int64_t activated_bytes = problem.tokens * problem.activated_stride * sizeof(float);
    const Memory operands = allocate(normalized_bytes + activated_bytes);
    problem.normalized = operands.get();
    problem.activated = operands.get() + normalized_bytes;

    const Kernels& run = kernels();
    const int64_t down_blocks = divide_up(problem.bottleneck, kBlockN);
    const int64_t up_blocks = divide_up(problem.width, kBlockN);
    threads = static_cast<int>(std::min<int64_t>(usable_threads(threads), std::max(down_blocks, up_blocks)));
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();  // may be fewer than asked for
        const auto cut = [&](int64_t count, int64_t at) { return count * at / team; };
        run.normalize(problem, cut(problem.tokens, thread), cut(problem.tokens, thread + 1));
#pragma omp barrier
        run.down(problem, cut(down_blocks, thread), cut(down_blocks, thread + 1), cut(up_blocks, thread));
#pragma omp barrier
        run.up(problem, cut(up_blocks, thread), cut(up_blocks, thread + 1));
    }
}

void renormalize(const LayerNorm& norm, int threads) {
    const Kernels& run = kernels();
    threads = usable_threads(threads);
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        run.renormalize(norm, norm.tokens * thread / team, norm.tokens * (thread + 1) / team);
    }
}

void norm_backward(LayerNorm norm, float* weight_grad, float* bias_grad, int threads) {
    const Kernels& run = kernels();
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
            for (int64_t column = 0; column < width; column++)
                total[column] += sums[(2 * block + which) * width + column];
    }
}

}  // namespace lynx::adapter
