#include "decode.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/instruction_sets.h"
#include "common/memory.h"
#include "attention_common/cpu/heads.h"

namespace lynx {

#define X(constant, name) extern const DecodeKernels decode_##name;
LYNX_INSTRUCTION_SETS
#undef X

namespace {

// Keys of a part, about: what merging its results costs is then little beside reading it.
constexpr int64_t kPartKeys = 128;
// Starting a second thread takes some microseconds, in which one thread reads about as much.
constexpr int64_t kBytesOfAThread = 64 << 10;
constexpr int64_t kSumMultiple = 16;  // lanes of the widest vector

const DecodeKernels& kernels() {
    static const DecodeKernels* const all[] = {
#define X(constant, name) &decode_##name,
        LYNX_INSTRUCTION_SETS
#undef X
    };
    return *all[static_cast<int>(instruction_set())];
}

int64_t divide_up(int64_t size, int64_t part) { return (size + part - 1) / part; }

std::vector<int64_t> read(const char* name, const Index& index, int64_t count, int64_t least, int64_t most) {
    std::vector<int64_t> values(count);
    for (int64_t i = 0; i < count; i++) {
        values[i] = index.is_int64 ? static_cast<const int64_t*>(index.data)[i]
                                   : static_cast<const int32_t*>(index.data)[i];
        if (values[i] < least || values[i] > most)
            throw std::invalid_argument("prefix_attention_decode: " + std::string(name) + "[" + std::to_string(i) +
                                        "] is " + std::to_string(values[i]) + ", expected " + std::to_string(least) +
                                        " to " + std::to_string(most));
    }
    return values;
}

Matrix entry(const Cache& cache, int64_t number, bool is_bfloat16) {
    Matrix matrix = cache.first;
    matrix.data = static_cast<char*>(matrix.data) + number * cache.stride * (is_bfloat16 ? 2 : 4);
    return matrix;
}

// Nothing here depends on how many threads there are.
struct DecodePlan {
    std::vector<int64_t> by_root;   // the branches of root 0, of root 1, ...
    std::vector<int64_t> each;      // 0, 1, ...
    std::vector<Segment> segments;  // the roots', then the branches'
    std::vector<Sources> sources;
    std::vector<Part> parts;  // roots first: more rows read them, so they take the longest
    int64_t num_results = 0, num_keys = 0;

    explicit DecodePlan(const DecodeProblem& problem) {
        const int64_t branches = problem.num_branches, roots = problem.num_roots;
        const auto to_root = read("branch_to_root", problem.branch_to_root, branches, 0, roots - 1);
        const auto root_lengths = read("root_lengths", problem.root_lengths, roots, 0, problem.root_room);
        const auto branch_lengths =
            read("branch_lengths", problem.branch_lengths, branches, problem.num_queries, problem.branch_room);
        each.resize(branches);
        std::iota(each.begin(), each.end(), 0);
        by_root = each;
        std::stable_sort(by_root.begin(), by_root.end(), [&](int64_t a, int64_t b) { return to_root[a] < to_root[b]; });

        segments.reserve(roots + branches);  // parts and sources point into it
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
    void add(Segment segment, const DecodeProblem& problem) {
        if (segment.num_branches > 0 && segment.num_keys > 0) {
            const int64_t most = std::min(kMostParts, divide_up(segment.num_keys, kPartKeys));
            segment.part_keys = divide_up(divide_up(segment.num_keys, most), kDecodeTile) * kDecodeTile;
            segment.num_parts = divide_up(segment.num_keys, segment.part_keys);
        }
        segment.first_result = num_results;
        num_results +=
            segment.num_parts * problem.num_kv_heads * segment.num_branches * problem.rows_of_branch();
        segments.push_back(segment);
        for (int64_t part = 0; part < segment.num_parts; part++)
            parts.push_back({&segments.back(), part, part * segment.part_keys,
                             std::min((part + 1) * segment.part_keys, segment.num_keys)});
        num_keys += segment.num_parts > 0 ? segment.num_keys : 0;
    }
};

}  // namespace

void decode(DecodeProblem problem, int threads) {
    const DecodePlan plan(problem);
    problem.sum_stride = divide_up(problem.head_dim, kSumMultiple) * kSumMultiple;
    const Memory results = allocate(plan.num_results * (problem.sum_stride + 2) * sizeof(float));
    problem.sums = reinterpret_cast<float*>(results.get());
    problem.totals = problem.sums + plan.num_results * problem.sum_stride;
    problem.maxima = problem.totals + plan.num_results;
    problem.sources = plan.sources.data();

    const DecodeKernels& run = kernels();
    size_t scratch_bytes = 0;
    for (const Segment& segment : plan.segments)
        scratch_bytes = std::max(scratch_bytes, run.scratch_bytes(problem, segment));
    const int64_t row_bytes = problem.num_kv_heads * problem.head_dim * (problem.is_bfloat16 ? 2 : 4);
    const auto threads_for = [&](int64_t bytes) {
        return static_cast<int>(std::min<int64_t>(threads, 1 + bytes / kBytesOfAThread));
    };
    share_out_heads(plan.parts.size(), problem.num_kv_heads, threads_for(2 * plan.num_keys * row_bytes), scratch_bytes,
                    [&](int64_t part, int64_t first_head, int64_t last_head, void* scratch) {
                        run.attend(problem, plan.parts[part], first_head, last_head, scratch);
                    });
    share_out(problem.num_branches, threads_for(plan.num_results * problem.sum_stride * sizeof(float)), 0,
              [&](int64_t branch, void*) { run.merge(problem, branch); });
}

}  // namespace lynx
