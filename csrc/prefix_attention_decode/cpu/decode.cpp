#include "decode.h"

#include <algorithm>
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

void check(bool is_right, const std::string& what, const std::string& value, const std::string& expected) {
    if (!is_right)
        throw std::invalid_argument("prefix_attention_decode: " + what + " is " + value + ", expected " + expected);
}

Matrix advanced(Matrix matrix, int64_t elements, bool is_bfloat16) {
    matrix.data = static_cast<char*>(matrix.data) + elements * (is_bfloat16 ? 2 : 4);
    return matrix;
}

// Nothing here depends on the number of threads, and what a branch computes does not depend on the others.
struct Plan {
    std::vector<int64_t> path_lengths;
    std::vector<Reader> readers;
    std::vector<Segment> segments;  // the shared ones, then the branches'
    std::vector<Part> parts;
    std::vector<Split> splits;  // those of shared segments first: more rows read them, so they take longest
    int64_t num_results = 0, num_keys = 0;

    explicit Plan(Problem problem) {
        const int64_t branches = problem.num_branches, ranges = problem.num_ranges, both = branches * ranges;
        std::vector<Range> read;
        read.reserve(both + branches);
        path_lengths.resize(branches);
        problem.path_lengths = path_lengths.data();
        for (int64_t branch = 0; branch < branches; branch++) {
            const int64_t first = read.size(), length = problem.branch_lengths[branch];
            check(problem.num_queries <= length && length <= problem.branch_capacity,
                  "branch_lengths[" + std::to_string(branch) + "]", std::to_string(length),
                  std::to_string(problem.num_queries) + " to " + std::to_string(problem.branch_capacity));
            int64_t& place = path_lengths[branch];
            for (int64_t i = branch * ranges; i < (branch + 1) * ranges; i++) {
                const int64_t begin = problem.ranges[2 * i], end = problem.ranges[2 * i + 1];
                check(0 <= begin && begin <= end && end <= problem.num_shared,
                      "ranges[" + std::to_string(branch) + ", " + std::to_string(i % ranges) + "]",
                      "[" + std::to_string(begin) + ", " + std::to_string(end) + "]",
                      "0 <= start <= end <= " + std::to_string(problem.num_shared));
                read.push_back({begin, end, {branch, place}, i + branch});
                place += end - begin;
            }
            read.push_back({0, length, {branch, place}, (branch + 1) * (ranges + 1) - 1});
            place += length;
            if (problem.is_local())
                for (size_t i = first; i < read.size(); i++) skip_unseen(read[i], problem.floor(branch, 0));
        }
        // Branches that read the same keys come together; a branch's own keys stand alone.
        const auto is_own = [&](const Range& range) { return range.part % (ranges + 1) == ranges; };
        if (ranges > 0)
            std::stable_sort(read.begin(), read.end(), [&](const Range& a, const Range& b) {
                if (is_own(a) || is_own(b)) return !is_own(a);
                return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
            });

        readers.reserve(read.size()), segments.reserve(read.size());  // others point into them
        parts.resize(read.size());
        for (const Range& range : read) {
            if (segments.empty() || is_own(range) || range.begin != first_ || range.end != last_)
                open(range, is_own(range), problem);
            segments.back().num_readers++;
            readers.push_back(range.reader);
            parts[range.part] = {&segments.back(), segments.back().num_readers - 1};
        }
        for (Segment& segment : segments) cut(segment, problem);
    }

   private:
    // Keys from `begin` to `end`, read as number `part` of all branches' parts.
    struct Range {
        int64_t begin, end;
        Reader reader;
        int64_t part;
    };

    int64_t first_ = -1, last_ = -1;  // of the shared keys of the last segment

    // Whole splits are skipped, so that branches of about the same length still share what they read.
    static void skip_unseen(Range& range, int64_t floor) {
        const int64_t unseen = floor - range.reader.offset;
        if (unseen <= 0) return;
        const int64_t skipped = unseen < range.end - range.begin ? unseen / kSplitKeys * kSplitKeys
                                                                 : range.end - range.begin;
        range.begin += skipped, range.reader.offset += skipped;
    }

    void open(const Range& range, bool is_own, const Problem& problem) {
        const auto at = [&](const Matrix& matrix, int64_t entry) {
            return advanced(matrix, entry + range.begin * matrix.row_stride, problem.is_bfloat16);
        };
        const int64_t branch = range.reader.branch;
        const Matrix k = is_own ? at(problem.branch_k.first, branch * problem.branch_k.stride) : at(problem.shared_k, 0);
        const Matrix v = is_own ? at(problem.branch_v.first, branch * problem.branch_v.stride) : at(problem.shared_v, 0);
        segments.push_back({k, v, range.end - range.begin, is_own, readers.data() + readers.size(), 0, 0, 0, 0});
        first_ = is_own ? -1 : range.begin, last_ = range.end;
    }

    void cut(Segment& segment, const Problem& problem) {
        if (segment.num_keys > 0) {
            const int64_t most_splits = std::min(kMaxSplits, divide_up(segment.num_keys, kSplitKeys));
            segment.split_keys = round_up(divide_up(segment.num_keys, most_splits), kBlockN);
            segment.num_splits = divide_up(segment.num_keys, segment.split_keys);
        }
        segment.first_result = num_results;
        num_results += segment.num_splits * problem.num_kv_heads * segment.num_readers * problem.rows_of_branch();
        for (int64_t split = 0; split < segment.num_splits; split++)
            splits.push_back({&segment, split, split * segment.split_keys,
                              std::min((split + 1) * segment.split_keys, segment.num_keys)});
        num_keys += segment.num_keys;
    }
};

}  // namespace

void forward(Problem problem, int threads) {
    const Plan plan(problem);
    problem.acc_stride = round_up(problem.value_dim, kAccMultiple);
    const Memory results = allocate(plan.num_results * (problem.acc_stride + 2) * sizeof(float));
    problem.acc = reinterpret_cast<float*>(results.get());
    problem.row_sum = problem.acc + plan.num_results * problem.acc_stride;
    problem.row_max = problem.row_sum + plan.num_results;
    problem.parts = plan.parts.data(), problem.path_lengths = plan.path_lengths.data();

    const Kernels& run = kernels();
    size_t scratch_bytes = 0;
    for (const Segment& segment : plan.segments)
        scratch_bytes = std::max(scratch_bytes, run.scratch_bytes(problem, segment));
    const int64_t cache_bytes = plan.num_keys * problem.num_kv_heads * (problem.head_dim + problem.value_dim) *
                                (problem.is_bfloat16 ? 2 : 4);
    const int64_t acc_bytes = plan.num_results * problem.acc_stride * sizeof(float);
    parallel_for_heads(plan.splits.size(), problem.num_kv_heads, threads_for_bytes(cache_bytes, threads), scratch_bytes,
                       [&](int64_t split, int64_t first_head, int64_t last_head, void* scratch) {
                           run.attend(problem, plan.splits[split], first_head, last_head, scratch);
                       });
    parallel_for(problem.num_branches, threads_for_bytes(acc_bytes, threads), run.combine_scratch_bytes(problem),
                 [&](int64_t branch, void* scratch) { run.combine(problem, branch, scratch); });
}

}  // namespace lynx::decode
