// The planner with random costs and options, saved and restored now and then: every sample in one pack, budgets kept.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "planner/planner.h"
#include "fuzz.h"

namespace {

using namespace lynx;

struct Samples {
    std::vector<int64_t> tokens, patches;

    Samples(Random& random, int64_t token_budget) {
        // Few lengths, so that equals meet; some beyond the budget; patches up to the largest number there may be.
        const int64_t longest = random.flag() ? std::min<int64_t>(token_budget, 5) : token_budget + token_budget / 9;
        const int64_t most_patches = random.flag() ? 3 : INT32_MAX;
        for (int64_t left = random.number(0, 200); left > 0; left--) {
            tokens.push_back(random.number(1, std::min<int64_t>(longest, INT32_MAX)));
            patches.push_back(random.flag() ? 0 : random.number(0, most_patches));
        }
    }

    Costs from(int64_t first, int64_t count) const { return {tokens.data() + first, patches.data() + first, count}; }
};

[[noreturn]] void fail(const char* what) {
    printf("\nplanner: %s\n", what);
    exit(1);
}

void check(const std::vector<Step>& steps, const Samples& samples, int64_t token_budget, int64_t ranks) {
    std::vector<int> uses(samples.tokens.size());
    for (const Step& step : steps) {
        if (static_cast<int64_t>(step.size()) != ranks) fail("a step without a pack for each rank");
        for (const std::vector<int64_t>& pack : step) {
            int64_t tokens = 0;
            for (int64_t index : pack) tokens += samples.tokens.at(index), uses.at(index)++;
            if (tokens > token_budget) fail("a pack over the budget");
            if (!std::is_sorted(pack.begin(), pack.end())) fail("a pack out of order");
        }
    }
    for (size_t i = 0; i < uses.size(); i++)
        if (uses[i] != (samples.tokens[i] <= token_budget)) fail("a sample lost or used twice");
}

std::vector<Step> online(Random& random, const Samples& samples, int64_t token_budget, int64_t ranks) {
    const int64_t lookahead = random.number(0, 9), count = samples.tokens.size();
    Planner planner(token_budget, ranks, lookahead);
    std::vector<Step> steps;
    const auto add = [&](std::vector<Step> more) { steps.insert(steps.end(), more.begin(), more.end()); };
    for (int64_t first = 0; first < count;) {
        const int64_t pushed = random.number(1, count - first);
        add(planner.push(samples.from(first, pushed)));
        first += pushed;
        if (planner.num_seen() != first) fail("samples that were not seen");
        if (random.flag()) {
            Planner other(token_budget, ranks, lookahead);
            other.restore(planner.num_seen(), planner.waiting());
            std::swap(planner, other);
        }
        if (random.number(0, 9) == 0) add(planner.flush());
    }
    add(planner.flush());
    return steps;
}

}  // namespace

void fuzz_planner(uint64_t seed) {
    Random random(seed);
    const int64_t token_budget = random.flag() ? random.number(1, 40) : random.number(1, INT32_MAX);
    const int64_t ranks = random.number(1, 9);
    const Samples samples(random, token_budget);
    check(online(random, samples, token_budget, ranks), samples, token_budget, ranks);
    check(plan_known(samples.from(0, samples.tokens.size()), token_budget, ranks), samples, token_budget, ranks);
}
