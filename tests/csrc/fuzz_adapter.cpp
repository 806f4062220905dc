// The adapter's forward with random sizes, dtypes and absent arguments, for the sanitizers; and whether every output is
// written.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/adapter/adapter.h"
#include "../../csrc/instruction_sets.h"
#include "fuzz.h"

namespace {

using namespace lynx;

// fp32 or bf16 numbers from 0.5 to 2, and nothing else in its memory.
struct Tensor {
    std::vector<uint16_t> memory;
    Numbers numbers;

    Tensor(Random& random, int64_t count, bool is_bfloat16, bool is_absent = false) {
        memory.resize(count * (is_bfloat16 ? 1 : 2));
        for (uint16_t& bits : memory) bits = 0x3f00 + random.number(0, 255);
        numbers = {is_absent ? nullptr : memory.data(), is_bfloat16};
    }

    void poison() { memory.assign(memory.size(), 0xffff); }

    bool is_written() const {
        const size_t words = numbers.is_bfloat16 ? 1 : 2;
        for (size_t i = words - 1; i < memory.size(); i += words)  // the upper half of fp32
            if (memory[i] == 0xffff) return false;
        return true;
    }
};

}  // namespace

void fuzz_adapter(uint64_t seed) {
    Random random(seed);
    Adapter adapter = {};
    adapter.tokens = random.number(0, random.flag() ? 3 : 20);
    adapter.width = random.number(1, random.flag() ? 20 : 100);
    adapter.bottleneck = random.number(1, random.flag() ? 20 : 100);
    adapter.eps = 1e-5f;
    adapter.activation = static_cast<Activation>(random.number(0, 3));
    const int64_t tokens = adapter.tokens, width = adapter.width, bottleneck = adapter.bottleneck;
    const bool is_bfloat16 = random.flag(), has_norm = random.flag();
    Tensor x(random, tokens * width, random.flag());
    Tensor norm_weight(random, width, random.flag(), !has_norm);
    Tensor norm_bias(random, width, random.flag(), !has_norm || random.flag());
    Tensor down_weight(random, bottleneck * width, is_bfloat16), up_weight(random, bottleneck * width, is_bfloat16);
    Tensor down_bias(random, bottleneck, random.flag(), random.flag());
    Tensor up_bias(random, width, random.flag(), random.flag());
    Tensor scale(random, 1, random.flag());
    Tensor out(random, tokens * width, x.numbers.is_bfloat16), preactivation(random, tokens * bottleneck, is_bfloat16);
    std::vector<float> mean(has_norm ? tokens : 0), rstd(has_norm ? tokens : 0);
    adapter.x = x.numbers, adapter.norm_weight = norm_weight.numbers, adapter.norm_bias = norm_bias.numbers;
    adapter.down_weight = down_weight.numbers, adapter.down_bias = down_bias.numbers;
    adapter.up_weight = up_weight.numbers, adapter.up_bias = up_bias.numbers, adapter.scale = scale.numbers;
    adapter.out = out.numbers, adapter.preactivation = preactivation.numbers;
    adapter.mean = mean.data(), adapter.rstd = rstd.data();
    for (const std::string& name : instruction_sets()) {
        force_instruction_set(name);
        out.poison(), preactivation.poison();
        mean.assign(mean.size(), NAN), rstd.assign(rstd.size(), NAN);
        adapter_forward(adapter, random.number(1, 3));
        bool is_written = out.is_written() && preactivation.is_written();
        for (size_t i = 0; i < mean.size(); i++) is_written &= !std::isnan(mean[i] + rstd[i]);
        if (!is_written) {
            printf("\n%s: an output is not written\n", name.c_str());
            exit(1);
        }
    }
    force_instruction_set("");
}
