// Attention over random layouts, forward and backward, for the sanitizers. Also checks that the LSE of every row is
// written, and that plans spend no queries on tiles that these do not reach.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "attention_common/cpu/attention.h"
#include "attention_common/cpu/plan.h"
#include "common/instruction_sets.h"
#include "fuzz.h"

namespace {

using namespace lynx;
using namespace lynx::attention;

int64_t random_length(Random& random) {
    return random.number(0, 3) == 0 ? 0 : random.number(1, random.flag() ? 9 : 150);
}

// Trees of a root and its branches, as PackedLayout's tables list them, with windows and chunks.
Layout random_packed_layout(Random& random) {
    std::vector<int32_t> runs, first, see_end, last, key_runs;
    int32_t start = 0;
    for (int64_t tree = random.number(0, random.flag() ? 3 : 8); tree > 0; tree--) {
        const int32_t root = random_length(random), root_start = start, root_end = start + root;
        std::vector<int32_t> lengths = {root};
        for (int64_t branch = random.number(0, 3); branch > 0; branch--) lengths.push_back(random_length(random));
        int32_t tree_end = start;
        for (int32_t length : lengths) tree_end += length;
        const bool is_full = random.flag();
        for (size_t i = 0; i < lengths.size(); i++) {
            const int32_t end = start + lengths[i];
            if (start == end) continue;
            const bool is_root = i == 0, goes_on = !is_root && root > 0 && start == root_end;
            if (!goes_on) {
                const bool sees_root = !is_root && root > 0;
                const int32_t offset = sees_root ? start - root : start;
                runs.insert(runs.end(), {start, offset, 0, sees_root ? root_start : 0, sees_root ? root_end : 0,
                                         sees_root ? root_start : 0});
            }
            const int32_t seen_until = is_root ? tree_end : end;
            if (!goes_on || last.back() != seen_until) key_runs.push_back(start);
            for (int32_t row = start; row < end; row++) {
                first.push_back(is_root && is_full ? start : row);
                see_end.push_back(is_root && is_full ? end : row + 1);
                last.push_back(seen_until);
            }
            start = end;
        }
    }
    runs.insert(runs.end(), {start, 0, 0, 0, 0, 0});
    key_runs.push_back(start);
    std::vector<int32_t> tokens = first;
    tokens.insert(tokens.end(), see_end.begin(), see_end.end());
    tokens.insert(tokens.end(), last.begin(), last.end());
    if (random.number(0, 9) == 0) {  // may be rejected
        std::vector<int32_t>& table = random.flag() ? runs : random.flag() || tokens.empty() ? key_runs : tokens;
        table[random.number(0, table.size() - 1)] += random.number(-9, 9);
    }
    const int64_t window = random.number(0, 2) == 0 ? random.number(1, 40) : 0;
    const int64_t chunk = window == 0 && random.number(0, 3) == 0 ? random.number(1, 40) : 0;
    return read_packed_layout({runs.data(), static_cast<int64_t>(runs.size() / 6) - 1, 6, tokens.data(), key_runs.data(),
                               static_cast<int64_t>(key_runs.size()) - 1, start, window, chunk});
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

void check_plan(const Layout& layout, const Plan& plan) {
    if (layout.see_end.empty()) return;  // of spans: every query sees all of them
    for (const Tile& tile : plan.tiles)
        if (layout.see_end[tile.first_query] <= tile.begin)
            fail("attention", "a tile begins at a query that does not see it");
}

}  // namespace

void fuzz_attention(uint64_t seed) {
    Random random(seed);
    Layout layout;
    try {
        layout = random.flag() ? random_packed_layout(random) : random_span_layout(random);
    } catch (const std::invalid_argument&) {
        return;
    }
    check_plan(layout, plan_forward(layout, 1));
    check_plan(layout, plan_backward(layout));
    const int64_t queries = layout.num_queries, keys = layout.num_keys;
    Problem problem = {};
    problem.num_queries = queries, problem.num_keys = keys;
    problem.num_kv_heads = random.number(1, random.flag() ? 2 : 5);
    problem.num_heads = problem.num_kv_heads * random.number(1, 2);
    problem.head_dim = random.number(1, random.flag() ? 20 : 130);
    problem.value_dim = random.flag() ? problem.head_dim : random.number(1, problem.head_dim);
    problem.scale = 0.1f;
    problem.softcap = random.flag() ? 0 : 2;
    problem.is_bfloat16 = random.flag();
    auto sized = [&](int64_t rows, int64_t heads, int64_t dim) {
        return Tensor(random, rows, heads, dim, problem.is_bfloat16);
    };
    auto make = [&](int64_t rows, int64_t heads) { return sized(rows, heads, problem.head_dim); };
    auto make_value = [&](int64_t rows, int64_t heads) { return sized(rows, heads, problem.value_dim); };
    Tensor q = make(queries, problem.num_heads), k = make(keys, problem.num_kv_heads);
    Tensor v = make_value(keys, problem.num_kv_heads);
    Tensor out = make_value(queries, problem.num_heads), dout = make_value(queries, problem.num_heads);
    Tensor dq = make(queries, problem.num_heads), dk = make(keys, problem.num_kv_heads);
    Tensor dv = make_value(keys, problem.num_kv_heads);
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
