#include "balance.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <tuple>

namespace lynx {
namespace {

constexpr int64_t SWAPS = 16;  // at most, for each rank; as in reference.py
constexpr Sample NOTHING = {-1, 0, 0};

struct Swap {
    Sample given, returned;
};

bool before(const Sample& left, const Sample& right) {
    return std::tie(left.tokens, left.patches, left.index) < std::tie(right.tokens, right.patches, right.index);
}

// Of the samples that cost the same, the oldest. `samples` are sorted.
std::vector<Sample> distinct(const std::vector<Sample>& samples, std::vector<Sample> found = {}) {
    for (const Sample& each : samples)
        if (found.empty() || found.back().tokens != each.tokens || found.back().patches != each.patches)
            found.push_back(each);
    return found;
}

std::optional<Swap> best_swap(const Pack& giver, const Pack& taker) {
    const int64_t difference = giver.patches - taker.patches;
    const std::vector<Sample> returns = distinct(taker.samples, {NOTHING});
    std::optional<Swap> best;
    int64_t smallest_error = difference;  // |2 moved - difference| is below it only where 0 < moved < difference
    size_t first = 0;
    for (const Sample& given : distinct(giver.samples)) {
        while (first < returns.size() && returns[first].tokens < given.tokens - taker.room) ++first;
        for (size_t i = first; i < returns.size() && returns[i].tokens <= given.tokens + giver.room; ++i) {
            const int64_t error = std::abs(2 * (given.patches - returns[i].patches) - difference);
            if (error < smallest_error) smallest_error = error, best = Swap{given, returns[i]};
        }
    }
    return best;
}

void move(const Sample& sample, Pack& from, Pack& to) {
    from.samples.erase(std::lower_bound(from.samples.begin(), from.samples.end(), sample, before));
    to.samples.insert(std::lower_bound(to.samples.begin(), to.samples.end(), sample, before), sample);
    from.room += sample.tokens, to.room -= sample.tokens;
    from.patches -= sample.patches, to.patches += sample.patches;
}

// One swap between the pack with the most patches and the first that can take some; whether there was one.
bool improve(std::vector<Pack>& packs, std::vector<size_t>& order) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t left, size_t right) { return packs[left].patches < packs[right].patches; });
    Pack& giver = packs[order.back()];
    for (size_t rank : order) {
        if (giver.patches - packs[rank].patches < 2) return false;
        if (const std::optional<Swap> swap = best_swap(giver, packs[rank])) {
            move(swap->given, giver, packs[rank]);
            if (swap->returned.index != NOTHING.index) move(swap->returned, packs[rank], giver);
            return true;
        }
    }
    return false;
}

}  // namespace

void balance(std::vector<Pack>& packs) {
    for (Pack& pack : packs) std::sort(pack.samples.begin(), pack.samples.end(), before);
    std::vector<size_t> order(packs.size());
    const int64_t most = SWAPS * static_cast<int64_t>(packs.size());
    for (int64_t swaps = 0; swaps < most && improve(packs, order); ++swaps) {
    }
}

}  // namespace lynx
