// The adapter with random sizes, dtypes and absent arguments, for the sanitizers. Also checks that every output is
// written.
#include <cmath>
#include <vector>

#include "adapter/cpu/adapter.h"
#include "common/instruction_sets.h"
#include "fuzz.h"

namespace {

using namespace lynx;
using namespace lynx::adapter;

// fp32 or bf16 numbers from 0.5 to 2. The memory holds nothing else.
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

void fuzz_norm_backward(Random& random) {
    LayerNorm norm = {};
    norm.tokens = random.number(0, random.flag() ? 3 : 600);
    norm.width = random.number(1, random.flag() ? 20 : 100);
    const int64_t count = norm.tokens * norm.width;
    const bool is_bfloat16 = random.flag(), needs_x = random.flag();
    Tensor x(random, count, random.flag()), normalized(random, count, is_bfloat16);
    Tensor normalized_grad(random, count, is_bfloat16), grad(random, count, x.numbers.is_bfloat16);
    Tensor x_grad(random, count, x.numbers.is_bfloat16, !needs_x);
    std::vector<float> statistics(norm.tokens, 1.5f), weight(norm.width, 1.5f), weight_grad(norm.width), bias_grad;
    norm.x = x.numbers, norm.mean = norm.rstd = statistics.data(), norm.weight = weight.data();
    norm.bias = random.flag() ? weight.data() : nullptr, norm.normalized = normalized.numbers;
    norm.normalized_grad = normalized_grad.numbers, norm.grad = grad.numbers, norm.x_grad = x_grad.numbers;
    const bool needs_weight = random.flag();
    if (random.flag()) bias_grad.resize(norm.width);
    for (const std::string& name : instruction_sets()) {
        force_instruction_set(name);
        normalized.poison(), x_grad.poison();
        weight_grad.assign(norm.width, NAN), bias_grad.assign(bias_grad.size(), NAN);
        lynx::adapter::renormalize(norm, random.number(1, 3));
        lynx::adapter::norm_backward(norm, needs_weight ? weight_grad.data() : nullptr,
                              bias_grad.empty() ? nullptr : bias_grad.data(), random.number(1, 3));
        bool is_written = normalized.is_written() && (!needs_x || x_grad.is_written());
        for (float each : weight_grad) is_written &= needs_weight != std::isnan(each);
        for (float each : bias_grad) is_written &= !std::isnan(each);
        if (!is_written) fail(name, "an output is not written");
    }
}

}  // namespace

void fuzz_adapter(uint64_t seed) {
    Random random(seed);
    fuzz_norm_backward(random);
    Problem problem = {};
    problem.tokens = random.number(0, random.flag() ? 3 : 20);
    problem.width = random.number(1, random.flag() ? 20 : 100);
    problem.bottleneck = random.number(1, random.flag() ? 20 : 100);
    problem.eps = 1e-5f;
    problem.activation = static_cast<Activation>(random.number(0, kNumActivations - 1));
    const int64_t tokens = problem.tokens, width = problem.width, bottleneck = problem.bottleneck;
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
    problem.x = x.numbers, problem.norm_weight = norm_weight.numbers, problem.norm_bias = norm_bias.numbers;
    problem.down_weight = down_weight.numbers, problem.down_bias = down_bias.numbers;
    problem.up_weight = up_weight.numbers, problem.up_bias = up_bias.numbers, problem.scale = scale.numbers;
    problem.out = out.numbers, problem.preactivation = preactivation.numbers;
    problem.mean = mean.data(), problem.rstd = rstd.data();
    for (const std::string& name : instruction_sets()) {
        force_instruction_set(name);
        out.poison(), preactivation.poison();
        mean.assign(mean.size(), NAN), rstd.assign(rstd.size(), NAN);
        lynx::adapter::forward(problem, random.number(1, 3));
        bool is_written = out.is_written() && preactivation.is_written();
        for (size_t i = 0; i < mean.size(); i++) is_written &= !std::isnan(mean[i] + rstd[i]);
        if (!is_written) fail(name, "an output is not written");
    }
    force_instruction_set("");
}
