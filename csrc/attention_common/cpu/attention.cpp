#include "attention.h"

#include <algorithm>
#include <memory>

#include "common/instruction_sets.h"
#include "common/numbers.h"
#include "heads.h"

namespace lynx::attention {

LYNX_CHOOSE_KERNELS(Kernels, attention_common)

namespace {

// Runs `kernel` for every task of the plan and every key head.
template <class ScratchBytes, class Kernel>
void run_tasks(const Plan& plan, Problem& problem, int threads, ScratchBytes scratch_bytes, Kernel kernel) {
    problem.runs = plan.runs.data();
    problem.tiles = plan.tiles.data();
    size_t bytes = 0;
    for (const Task& task : plan.tasks) bytes = std::max(bytes, scratch_bytes(problem, task));
    parallel_for_heads(plan.tasks.size(), problem.num_kv_heads, threads, bytes,
                       [&](int64_t task, int64_t first_head, int64_t last_head, void* scratch) {
                           for (int64_t head = first_head; head < last_head; head++)
                               kernel(problem, plan.tasks[task], head, scratch);
                       });
}

// dq of the queries of split groups: the sum over the splits, always in the same order.
template <class Element>
void combine_dq(const Plan& plan, const Problem& problem, int threads) {
    struct SplitRun {
        Run run;
        int64_t num_splits;
    };
    std::vector<SplitRun> split_runs;
    for (const Task& task : plan.tasks) {
        if (!task.is_split || task.split != 0) continue;
        int64_t num_splits = 0;
        for (const Task& other : plan.tasks) num_splits += other.is_split && other.first_run == task.first_run;
        for (int64_t i = task.first_run; i < task.last_run; i++) split_runs.push_back({plan.runs[i], num_splits});
    }
    const int64_t dim = problem.head_dim, width = problem.num_heads * dim;
    for (const auto& [run, num_splits] : split_runs) {
        const int64_t splits = num_splits, first_query = run.first_query, last_query = run.last_query;
#pragma omp parallel for num_threads(usable_threads(threads))
        for (int64_t query = first_query; query < last_query; query++)
            for (int64_t head = 0; head < problem.num_heads; head++)
                for (int64_t column = 0; column < dim; column++) {
                    const float* first = problem.dq_splits + query * width + head * dim + column;
                    float sum = 0;
                    for (int64_t i = 0; i < splits; i++) sum += first[i * problem.num_queries * width];
                    narrow(sum, static_cast<Element*>(problem.dq.data)[query * problem.dq.row_stride +
                                                                       head * problem.dq.head_stride + column]);
                }
    }
}

}  // namespace

void forward(const Layout& layout, Problem problem, int threads) {
    const Plan plan = plan_forward(layout, problem.num_heads / problem.num_kv_heads);
    run_tasks(plan, problem, threads, kernels().forward_scratch_bytes, kernels().forward);
}

void backward(const Layout& layout, Problem problem, int threads) {
    const Plan plan = plan_backward(layout);
    std::unique_ptr<float[]> dq_splits(
        new float[plan.num_splits * problem.num_queries * problem.num_heads * problem.head_dim]);
    problem.dq_splits = dq_splits.get();
    run_tasks(plan, problem, threads, kernels().backward_scratch_bytes, kernels().backward);
    if (problem.is_bfloat16)
        combine_dq<BFloat16>(plan, problem, threads);
    else
        combine_dq<float>(plan, problem, threads);
}

}  // namespace lynx::attention
