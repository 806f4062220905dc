#include "decode.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_common/cpu/heads.h"
#include "common/instruction_sets.h"
#include "common/integers.h"
#include "common/memory.h"

namespace lynx::decode {

LYNX_CHOOSE_KERNELS(Kernels, prefix_attention_decode)

namespace {

// Keys of a split, about: combining its results then costs little beside reading it.
constexpr int64_t kSplitKeys = 128;
constexpr int64_t kAccMultiple = 16;  // lanes of the widest vector

std::vector<int64_t> read(const char* name, const Index& index, int64_t count, int64_t min_value, int64_t max_value) {
    std::vector<int64_t> values(count);
    for (int64_t i = 0; i < count; i++) {
        values[i] = index.is_int64 ? static_cast<const int64_t*>(index.data)[i]
                                   : static_cast<const int32_t*>(index.data)[i];
        if (values[i] < min_value || values[i] > max_value)
            throw std::invalid_argument("prefix_attention_decode: " + std::string(name) + "[" + std::to_string(i) +
                                        "] is " + std::to_string(values[i]) + ", expected " +
                                        std::to_string(min_value) + " to " + std::to_string(max_value));
    }
    return values;
}

Matrix entry(const Cache& cache, int64_t number, bool is_bfloat16) {
    Matrix matrix = cache.first;
    matrix.data = static_cast<char*>(matrix.data) + number * cache.stride * (is_bfloat16 ? 2 : 4);
    return matrix;
}

// Nothing here depends on the number of threads.
struct Plan {
    std::vector<int64_t> by_root;   // the branches of root 0, then those of root 1, and so on
    std::vector<int64_t> each;      // 0, 1, ...
    std::vector<Segment> segments;  // the roots', then the branches'
    std::vector<Sources> sources;
    std::vector<Split> splits;  // the roots' first: more rows read them, so they take longest
    int64_t num_results = 0, num_keys = 0;

    explicit Plan(const Problem& problem) {
        const int64_t branches = problem.num_branches, roots = problem.num_roots;
        const auto to_root = read("branch_to_root", problem.branch_to_root, branches, 0, roots - 1);
        const auto root_lengths = read("root_lengths", problem.root_lengths, roots, 0, problem.root_capacity);
        const auto branch_lengths =
            read("branch_lengths", problem.branch_lengths, branches, problem.num_queries, problem.branch_capacity);
        each.resize(branches);
        std::iota(each.begin(), each.end(), 0);
        by_root = each;
        std::stable_sort(by_root.begin(), by_root.end(), [&](int64_t a, int64_t b) { return to_root[a] < to_root[b]; });

        segments.reserve(roots + branches);  // splits and sources point into it
        const int64_t* first = by_root.data();
        for (int64_t root = 0; root < roots; root++) {
            int64_t count = 0;
            while (first + count < by_root.data() + branches && to_root[first[count]] == root) count++;
            add({entry(problem.root_k, root, problem.is_bfloat16), entry(problem.root_v, root, problem.is_bfloat16),
                 root_lengths[root], false, first, count, 0, 0, 0},
                problem);
            first += count;
        }
        for (int64_t branch = 0; branch < branches; branch++)
            add({entry(problem.branch_k, branch, problem.is_bfloat16),
                 entry(problem.branch_v, branch, problem.is_bfloat16), branch_lengths[branch], true, &each[branch], 1,
                 0, 0, 0},
                problem);

        sources.resize(branches);
        for (int64_t root = 0; root < roots; root++)
            for (int64_t place = 0; place < segments[root].num_branches; place++) {
                const int64_t branch = segments[root].branches[place];
                sources[branch] = {&segments[root], &segments[roots + branch], place};
            }
    }

   private:
    void add(Segment segment, const Problem& problem) {
        if (segment.num_branches > 0 && segment.num_keys > 0) {
            const int64_t most_splits = std::min(kMaxSplits, divide_up(segment.num_keys, kSplitKeys));
            segment.split_keys = round_up(divide_up(segment.num_keys, most_splits), kBlockN);
            segment.num_splits = divide_up(segment.num_keys, segment.split_keys);
        }
        segment.first_result = num_results;
        num_results += segment.num_splits * problem.num_kv_heads * segment.num_branches * problem.rows_of_branch();
        segments.push_back(segment);
        for (int64_t split = 0; split < segment.num_splits; split++)
            splits.push_back({&segments.back(), split, split * segment.split_keys,
                              std::min((split + 1) * segment.split_keys, segment.num_keys)});
        num_keys += segment.num_splits > 0 ? segment.num_keys : 0;
    }
};

}  // namespace

void forward(Problem problem, int threads) {
    const Plan plan(problem);
    problem.acc_stride = round_up(problem.head_dim, kAccMultiple);
    const Memory results = allocate(plan.num_results * (problem.acc_stride + 2) * sizeof(float));
    problem.acc = reinterpret_cast<float*>(results.get());
    problem.row_sum = problem.acc + plan.num_results * problem.acc_stride;
    problem.row_max = problem.row_sum + plan.num_results;
    problem.sources = plan.sources.data();

    const Kernels& run = kernels();
    size_t scratch_bytes = 0;
    for (const Segment& segment : plan.segments)
        scratch_bytes = std::max(scratch_bytes, run.scratch_bytes(problem, segment));
    const int64_t cache_bytes =
        2 * plan.num_keys * problem.num_kv_heads * problem.head_dim * (problem.is_bfloat16 ? 2 : 4);
    const int64_t acc_bytes = plan.num_results * problem.acc_stride * sizeof(float);
    parallel_for_heads(plan.splits.size(), problem.num_kv_heads, threads_for_bytes(cache_bytes, threads), scratch_bytes,
                       [&](int64_t split, int64_t first_head, int64_t last_head, void* scratch) {
                           run.attend(problem, plan.splits[split], first_head, last_head, scratch);
                       });
    parallel_for(problem.num_branches, threads_for_bytes(acc_bytes, threads), 0,
                 [&](int64_t branch, void*) { run.combine(problem, branch); });
}

}  // namespace lynx::decode
