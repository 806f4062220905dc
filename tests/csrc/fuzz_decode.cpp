// Decoding with random sizes, lengths and strides, for the sanitizers. Also checks that every output is written, and is
// a mean of the values.
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "prefix_attention_decode/cpu/decode.h"
#include "common/instruction_sets.h"
#include "fuzz.h"

namespace {

using namespace lynx;
using namespace lynx::decode;

// (entries, rows, heads, dim) of fp32 or bf16 numbers from 0.5 to 2, with rows or heads outside. The memory holds
// nothing else.
struct Tensor {
    std::vector<uint16_t> memory;
    Cache cache;

    Tensor(Random& random, int64_t entries, int64_t rows, int64_t heads, int64_t dim, bool is_bfloat16) {
        memory.resize(entries * rows * heads * dim * (is_bfloat16 ? 1 : 2));
        for (uint16_t& bits : memory) bits = 0x3f00 + random.number(0, 255);
        const bool heads_outside = random.flag();
        cache = {{memory.data(), heads_outside ? dim : heads * dim, heads_outside ? rows * dim : dim},
                 rows * heads * dim};
    }
};

// Numbers in either dtype.
struct Numbers {
    std::vector<int32_t> narrow;
    std::vector<int64_t> wide;
    bool is_int64;

    Index index() const {
        return {is_int64 ? static_cast<const void*>(wide.data()) : static_cast<const void*>(narrow.data()), is_int64};
    }
};

Numbers random_numbers(Random& random, int64_t count, int64_t least, int64_t most) {
    Numbers numbers = {{}, {}, random.flag()};
    for (int64_t i = 0; i < count; i++) numbers.wide.push_back(random.number(least, most));
    if (count > 0 && random.number(0, 19) == 0)  // may be rejected
        numbers.wide[random.number(0, count - 1)] += random.number(-3, 3);
    numbers.narrow.assign(numbers.wide.begin(), numbers.wide.end());
    return numbers;
}

float number_at(const std::vector<uint16_t>& memory, int64_t i, bool is_bfloat16) {
    const uint32_t bits = is_bfloat16 ? static_cast<uint32_t>(memory[i]) << 16
                                      : memory[2 * i] | static_cast<uint32_t>(memory[2 * i + 1]) << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

}  // namespace

void fuzz_decode(uint64_t seed) {
    Random random(seed);
    Problem problem = {};
    problem.num_branches = random.number(0, random.flag() ? 3 : 9);
    problem.num_queries = random.number(1, random.flag() ? 1 : 4);
    problem.num_kv_heads = random.number(1, 3);
    problem.num_heads = problem.num_kv_heads * random.number(1, random.flag() ? 2 : 7);
    problem.head_dim = random.number(1, random.flag() ? 20 : 130);
    const int64_t dim = problem.value_dim = random.flag() ? problem.head_dim : random.number(1, problem.head_dim);
    problem.num_ranges = random.number(0, random.flag() ? 1 : 4);
    problem.num_shared = random.number(0, random.flag() ? 20 : 900);
    problem.branch_capacity = problem.num_queries + random.number(0, random.flag() ? 9 : 200);
    problem.scale = 0.1f;
    (random.flag() ? problem.window : problem.chunk) = random.flag() ? random.number(1, random.flag() ? 9 : 400) : 0;
    problem.softcap = random.flag() ? 3.0f : 0.0f;
    problem.is_bfloat16 = random.flag();
    auto make = [&](int64_t entries, int64_t rows, int64_t heads, int64_t width) {
        return Tensor(random, entries, rows, heads, width, problem.is_bfloat16);
    };
    Tensor q = make(problem.num_branches, problem.num_queries, problem.num_heads, problem.head_dim);
    Tensor shared_k = make(1, problem.num_shared, problem.num_kv_heads, problem.head_dim);
    Tensor shared_v = make(1, problem.num_shared, problem.num_kv_heads, dim);
    Tensor branch_k = make(problem.num_branches, problem.branch_capacity, problem.num_kv_heads, problem.head_dim);
    Tensor branch_v = make(problem.num_branches, problem.branch_capacity, problem.num_kv_heads, dim);
    Numbers ranges = random_numbers(random, problem.num_branches * problem.num_ranges * 2, 0, problem.num_shared);
    for (size_t i = 0; i < ranges.wide.size(); i += 2)
        if (ranges.wide[i] > ranges.wide[i + 1]) std::swap(ranges.wide[i], ranges.wide[i + 1]);
    ranges.narrow.assign(ranges.wide.begin(), ranges.wide.end());
    const Numbers branch_lengths =
        random_numbers(random, problem.num_branches, problem.num_queries, problem.branch_capacity);
    problem.q = q.cache, problem.shared_k = shared_k.cache.first, problem.shared_v = shared_v.cache.first;
    problem.branch_k = branch_k.cache, problem.branch_v = branch_v.cache;
    problem.ranges = ranges.index(), problem.branch_lengths = branch_lengths.index();
    const int64_t rows = problem.num_branches * problem.num_queries * problem.num_heads;
    std::vector<float> lse(rows);
    std::vector<uint16_t> out(rows * dim * (problem.is_bfloat16 ? 1 : 2));
    problem.lse = lse.data(), problem.out = out.data();
    for (const std::string& name : instruction_sets()) {
        force_instruction_set(name);
        lse.assign(rows, NAN), out.assign(out.size(), 0xffff);
        try {
            decode::forward(problem, random.number(1, 3));
        } catch (const std::invalid_argument&) {
            break;
        }
        bool is_right = true;
        for (float each : lse) is_right &= std::isfinite(each);
        for (int64_t i = 0; i < rows * dim; i++) {
            const float number = number_at(out, i, problem.is_bfloat16);
            is_right &= 0.49f < number && number < 2.01f;
        }
        if (!is_right) fail(name, "an output is not written, or is not a mean of the values");
    }
    force_instruction_set("");
}
