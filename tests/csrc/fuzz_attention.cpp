// Attention over random layouts, forward and backward, for the sanitizers. Also checks that the LSE of every row is
// written.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "attention_common/cpu/attention.h"
#include "common/instruction_sets.h"
#include "fuzz.h"

namespace {

using namespace lynx;
using namespace lynx::attention;

int64_t random_length(Random& random) {
    return random.number(0, 3) == 0 ? 0 : random.number(1, random.flag() ? 9 : 150);
}

// Groups of a root and its branches, as PackedLayout.segments lists them.
Layout random_packed_layout(Random& random) {
    std::vector<int32_t> table;
    int32_t start = 0;
    for (int64_t group = random.number(0, random.flag() ? 3 : 8); group > 0; group--) {
        std::vector<int32_t> lengths;
        const int32_t root = random_length(random);
        int32_t end = start + root;
        for (int64_t branch = random.number(0, 3); branch > 0; branch--) {
            lengths.push_back(random_length(random));
            end += lengths.back();
        }
        const int32_t root_start = start, root_end = start + root;
        lengths.insert(lengths.begin(), root);
        for (int32_t length : lengths) {
            table.insert(table.end(), {start, root_start, root_end, end});
            start += length;
        }
    }
    table.insert(table.end(), {start, start, start, start});
    if (random.number(0, 9) == 0) table[random.number(0, table.size() - 1)] += random.number(-9, 9);  // may be rejected
    return read_packed_layout(table.data(), table.size() / 4, start, random.flag());
}

Layout random_span_layout(Random& random) {
    std::vector<int32_t> table;
    const int32_t num_keys = random_length(random);
    int32_t start = 0;
    for (int64_t segment = random.number(0, 5); segment > 0; segment--) {
        const int32_t first = random.number(0, num_keys), last = random.number(first, num_keys);
        table.insert(table.end(), {start, first, last});
        start += random_length(random);
    }
    table.insert(table.end(), {start, 0, 0});
    if (random.number(0, 9) == 0) table[random.number(0, table.size() - 1)] += random.number(-9, 9);
    return read_span_layout(table.data(), table.size() / 3, start, num_keys);
}

// (rows, heads, dim) of fp32 or bf16 numbers from 0.5 to 2. The memory holds nothing else.
struct Tensor {
    std::vector<uint16_t> memory;
    Matrix matrix;

    Tensor(Random& random, int64_t rows, int64_t heads, int64_t dim, bool is_bfloat16) {
        const int64_t count = rows * heads * dim;
        memory.resize(count * (is_bfloat16 ? 1 : 2));
        for (uint16_t& bits : memory) bits = 0x3f00 + random.number(0, 255);
        matrix = {memory.data(), heads * dim, dim};
    }
};

}  // namespace

void fuzz_attention(uint64_t seed) {
    Random random(seed);
    Layout layout;
    try {
        layout = random.flag() ? random_packed_layout(random) : random_span_layout(random);
    } catch (const std::invalid_argument&) {
        return;
    }
    const int64_t queries = layout.num_queries, keys = layout.num_keys;
    Problem problem = {};
    problem.num_queries = queries, problem.num_keys = keys;
    problem.num_kv_heads = random.number(1, random.flag() ? 2 : 5);
    problem.num_heads = problem.num_kv_heads * random.number(1, 2);
    problem.head_dim = random.number(1, random.flag() ? 20 : 130);
    problem.scale = 0.1f;
    problem.is_bfloat16 = random.flag();
    auto make = [&](int64_t rows, int64_t heads) {
        return Tensor(random, rows, heads, problem.head_dim, problem.is_bfloat16);
    };
    Tensor q = make(queries, problem.num_heads), k = make(keys, problem.num_kv_heads);
    Tensor v = make(keys, problem.num_kv_heads);
    Tensor out = make(queries, problem.num_heads), dout = make(queries, problem.num_heads);
    Tensor dq = make(queries, problem.num_heads), dk = make(keys, problem.num_kv_heads);
    Tensor dv = make(keys, problem.num_kv_heads);
    std::vector<float> lse(queries * problem.num_heads), dlse(queries * problem.num_heads, 0.5f);
    problem.q = q.matrix, problem.k = k.matrix, problem.v = v.matrix, problem.out = out.matrix;
    problem.dout = dout.matrix, problem.dq = dq.matrix, problem.dk = dk.matrix;
    problem.dv = dv.matrix, problem.lse = lse.data();
    problem.dlse = random.flag() ? dlse.data() : nullptr;
    for (const std::string& name : instruction_sets()) {
        force_instruction_set(name);
        std::fill(lse.begin(), lse.end(), NAN);
        attention::forward(layout, problem, random.number(1, 3));
        for (float each : lse)
            if (std::isnan(each)) fail(name, "a row is not written");
        attention::backward(layout, problem, random.number(1, 3));
    }
    force_instruction_set("");
}
