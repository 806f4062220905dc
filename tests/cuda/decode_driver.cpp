// The CUDA kernels of prefix_attention_decode on the CPU: `decode_driver <numbers>`, or `decode_driver shape <numbers>`
// for how they would be launched.
#include "prefix_attention_decode/cuda/launches.h"
#include "driver.h"
#include "on_host.h"

namespace {

// The numbers of the problem, without its memory.
lynx::decode::Problem problem_of(const Numbers& numbers) {
    lynx::decode::Problem problem = {};
    auto number = [&](const char* name) { return static_cast<int>(numbers[name]); };
    problem.branches = number("branches"), problem.queries = number("queries"), problem.heads = number("heads");
    problem.kv_heads = number("kv_heads"), problem.dim = number("dim"), problem.num_shared = number("num_shared");
    problem.ranges_of_branch = number("ranges"), problem.branch_capacity = number("branch_capacity");
    return problem;
}

void run(const Numbers& numbers) {
    lynx::decode::Problem problem = problem_of(numbers);
    const int64_t rows = static_cast<int64_t>(problem.branches) * problem.queries * problem.heads;
    const auto q_dtype = static_cast<lynx::Dtype>(numbers["q_dtype"]);
    const Buffer scale(sizeof(double)), q(rows * problem.dim * kSizes[numbers["q_dtype"]], numbers["q_offset"]);
    scale.read(), q.read();
    problem.q = lynx::values_of(q.data(), q_dtype);
    std::vector<std::unique_ptr<Buffer>> memory;
    auto read = [&](int64_t bytes, int64_t offset = 0) {
        memory.push_back(std::make_unique<Buffer>(bytes, offset));
        memory.back()->read();
        return memory.back()->data();
    };
    auto cache = [&](const std::string& name) -> lynx::decode::Cache {
        return {read(numbers[name + "_bytes"], numbers[name + "_offset"]),
                {numbers[name + "_stride0"], numbers[name + "_stride1"], numbers[name + "_stride2"]}};
    };
    auto indices = [&](const std::string& name, int count) -> lynx::decode::Indices {
        const bool is_long = numbers[name + "_is_long"] != 0;
        return {read(count * (is_long ? 8 : 4)), is_long};
    };
    problem.shared_k = cache("shared_k"), problem.shared_v = cache("shared_v");
    problem.branch_k = cache("branch_k"), problem.branch_v = cache("branch_v");
    problem.ranges = indices("ranges", problem.branches * problem.ranges_of_branch * 2);
    problem.branch_lengths = indices("branch_lengths", problem.branches);
    const Buffer out(rows * problem.dim * kSizes[numbers["q_dtype"]]), lse(rows * sizeof(float));
    const lynx::decode::Call call = {problem, static_cast<lynx::Dtype>(numbers["cache_dtype"]),
                                     *static_cast<double*>(scale.data()), out.data(), static_cast<float*>(lse.data()),
                                     static_cast<int>(numbers["multiprocessors"])};
    lynx::decode::forward(call, lynx::OnHost(static_cast<unsigned>(numbers["seed"])), [&](int64_t count) {
        memory.push_back(std::make_unique<Buffer>(count * sizeof(float)));
        return static_cast<float*>(memory.back()->data());
    });
    out.write(), lse.write();
}

// Prints how the launch of attention is cut: blocks, rows of a tile, and so on. The launch that combines is not shown.
struct Show {
    template <class Element, int kDim, int kBlockM>
    void operator()(lynx::decode::Attend<Element, kDim, kBlockM>, const lynx::decode::Problem& problem, int blocks) {
        printf("%d %d %d %d %d %d %d\n", blocks, kBlockM, problem.tile_branches, problem.m_tiles, problem.range_splits,
               problem.branch_splits, lynx::decode::Attend<Element, kDim, kBlockM>::kBlockN);
    }
    void operator()(lynx::decode::Combine, const lynx::decode::Combine::Args&, int) {}
};

void show(const Numbers& numbers) {
    lynx::decode::Call call = {};
    call.problem = problem_of(numbers);
    call.cache_dtype = static_cast<lynx::Dtype>(numbers["cache_dtype"]);
    call.multiprocessors = static_cast<int>(numbers["multiprocessors"]);
    lynx::decode::forward(call, Show(), [](int64_t) -> float* { return nullptr; });
}

}  // namespace

int main(int count, char** words) { return run_or_show(count, words, run, show); }
