#include "attention.h"

#include <algorithm>
#include <memory>

#include "common/instruction_sets.h"
#include "common/numbers.h"
#include "heads.h"

namespace lynx {

#define X(constant, name) extern const Kernels attention_##name;
LYNX_INSTRUCTION_SETS
#undef X

namespace {

const Kernels& kernels() {
    static const Kernels* const all[] = {
#define X(constant, name) &attention_##name,
        LYNX_INSTRUCTION_SETS
#undef X
    };
    return *all[static_cast<int>(instruction_set())];
}

// Run `kernel` on every unit of the plan for every key head.
template <class ScratchBytes, class Kernel>
void run_units(const Plan& plan, Problem& problem, int threads, ScratchBytes scratch_bytes, Kernel kernel) {
    problem.runs = plan.runs.data();
    problem.tiles = plan.tiles.data();
    size_t bytes = 0;
    for (const Unit& unit : plan.units) bytes = std::max(bytes, scratch_bytes(problem, unit));
    share_out_heads(plan.units.size(), problem.num_kv_heads, threads, bytes,
                    [&](int64_t unit, int64_t first_head, int64_t last_head, void* scratch) {
                        for (int64_t head = first_head; head < last_head; head++)
                            kernel(problem, plan.units[unit], head, scratch);
                    });
}

// The gradients of the queries of split groups: the sums of their parts, always in the same order.
template <class Element>
void add_parts(const Plan& plan, const Problem& problem, int threads) {
    struct Split {
        Run run;
        int64_t parts;
    };
    std::vector<Split> splits;
    for (const Unit& unit : plan.units) {
        if (!unit.is_split || unit.part != 0) continue;
        int64_t parts = 0;
        for (const Unit& other : plan.units) parts += other.is_split && other.first_run == unit.first_run;
        for (int64_t i = unit.first_run; i < unit.last_run; i++) splits.push_back({plan.runs[i], parts});
    }
    const int64_t dim = problem.head_dim, width = problem.num_heads * dim;
    for (const Split& split : splits) {
#pragma omp parallel for num_threads(usable_threads(threads))
        for (int64_t query = split.run.first_query; query < split.run.last_query; query++)
            for (int64_t head = 0; head < problem.num_heads; head++)
                for (int64_t column = 0; column < dim; column++) {
                    const float* part = problem.partial_grad_q + query * width + head * dim + column;
                    float sum = 0;
                    for (int64_t i = 0; i < split.parts; i++) sum += part[i * problem.num_queries * width];
                    narrow(sum, static_cast<Element*>(problem.grad_q.data)[query * problem.grad_q.row_stride +
                                                                           head * problem.grad_q.head_stride + column]);
                }
    }
}

}  // namespace

void attention_forward(const Layout& layout, Problem problem, int threads) {
    const Plan plan = plan_forward(layout, problem.num_heads / problem.num_kv_heads);
    run_units(plan, problem, threads, kernels().forward_scratch_bytes, kernels().forward);
}

void attention_backward(const Layout& layout, Problem problem, int threads) {
    const Plan plan = plan_backward(layout);
    std::unique_ptr<float[]> parts(
        new float[plan.parts * problem.num_queries * problem.num_heads * problem.head_dim]);
    problem.partial_grad_q = parts.get();
    run_units(plan, problem, threads, kernels().backward_scratch_bytes, kernels().backward);
    if (problem.is_bfloat16)
        add_parts<BFloat16>(plan, problem, threads);
    else
        add_parts<float>(plan, problem, threads);
}

}  // namespace lynx
