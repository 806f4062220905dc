#include "attention.h"

#include <algorithm>
#include <memory>

#include "common/instruction_sets.h"
#include "common/numbers.h"
#include "heads.h"

namespace lynx::attention {

LYNX_CHOOSE_KERNELS(Kernels, attention_common)

namespace {

void set_layout(const Layout& layout, Problem& problem) {
    problem.num_queries = layout.num_queries;
    problem.num_keys = layout.num_keys;
    problem.see_end = layout.see_end.empty() ? nullptr : layout.see_end.data();
    problem.floor = layout.floor.empty() ? nullptr : layout.floor.data();
}

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
    std::vector<std::vector<int64_t>> splits_of(plan.runs.size());  // the splits whose keys a run may see
    for (int64_t split = 0; split < plan.num_splits; split++)
        for (const Task& task : plan.tasks)
            if (task.is_split && task.split == split)
                for (int64_t i = task.first_run; i < task.last_run; i++) splits_of[i].push_back(split);
    const int64_t dim = problem.head_dim, width = problem.num_heads * dim;
    for (size_t i = 0; i < plan.runs.size(); i++) {
        const std::vector<int64_t>& splits = splits_of[i];
        if (splits.empty()) continue;
        const int64_t first_query = plan.runs[i].first_query, last_query = plan.runs[i].last_query;
#pragma omp parallel for num_threads(usable_threads(threads)) if (last_query - first_query > 16)
        for (int64_t query = first_query; query < last_query; query++)
            for (int64_t head = 0; head < problem.num_heads; head++)
                for (int64_t column = 0; column < dim; column++) {
                    const float* parts = problem.dq_splits + query * width + head * dim + column;
                    float sum = 0;
                    for (const int64_t split : splits) sum += parts[split * problem.num_queries * width];
                    narrow(sum, static_cast<Element*>(problem.dq.data)[query * problem.dq.row_stride +
                                                                       head * problem.dq.head_stride + column]);
                }
    }
}

}  // namespace

void forward(const Layout& layout, Problem problem, int threads) {
    set_layout(layout, problem);
    const Plan plan = plan_forward(layout, problem.num_heads / problem.num_kv_heads);
    run_tasks(plan, problem, threads, kernels().forward_scratch_bytes, kernels().forward);
}

void backward(const Layout& layout, Problem problem, int threads) {
    set_layout(layout, problem);
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
