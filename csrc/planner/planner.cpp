#include "planner.h"

#include <algorithm>
#include <iterator>
#include <tuple>

#include "balance.h"

namespace lynx {
namespace {

bool tighter(const Pack& left, const Pack& right) { return left.room < right.room; }

// Of the packs with so much room, or null.
Pack* fewest_patches(std::vector<Pack>& packs, int64_t room) {
    Pack* best = nullptr;
    for (Pack& pack : packs)
        if (pack.room >= room && (best == nullptr || std::tie(pack.patches, best->room) <
                                                         std::tie(best->patches, pack.room)))
            best = &pack;
    return best;
}

void add_to(Pack& pack, const Sample& sample) {
    pack.samples.push_back(sample);
    pack.room -= sample.tokens;
    pack.patches += sample.patches;
}

}  // namespace

Planner::Planner(int64_t token_budget, int64_t ranks, int64_t lookahead)
    : token_budget_(token_budget), ranks_(ranks), enough_((ranks + lookahead) * token_budget) {}

std::vector<Step> Planner::push(const Costs& costs) {
    std::vector<Step> steps;
    for (int64_t i = 0; i < costs.count; ++i) {
        const Sample sample = {num_seen_++, costs.tokens[i], costs.patches[i]};
        if (sample.tokens > token_budget_) continue;
        add(sample);
        while (waiting_tokens_ >= enough_) steps.push_back(make_step());
    }
    return steps;
}

std::vector<Step> Planner::flush() {
    std::vector<Step> steps;
    while (!by_length_.empty()) steps.push_back(make_step());
    return steps;
}

std::vector<Sample> Planner::waiting() const {
    std::vector<Sample> found;
    for (const Sample& each : arrivals_)
        if (by_length_.count(each)) found.push_back(each);
    return found;
}

void Planner::restore(int64_t num_seen, const std::vector<Sample>& waiting) {
    num_seen_ = num_seen;
    waiting_tokens_ = 0;
    arrivals_.clear();
    by_length_.clear();
    for (const Sample& each : waiting) add(each);
}

void Planner::add(const Sample& sample) {
    arrivals_.push_back(sample);
    by_length_.insert(sample);
    waiting_tokens_ += sample.tokens;
}

// The sample that waits longest, if it fits.
std::optional<Sample> Planner::take_oldest(int64_t room) {
    while (!arrivals_.empty() && !by_length_.count(arrivals_.front())) arrivals_.pop_front();
    if (arrivals_.empty() || arrivals_.front().tokens > room) return std::nullopt;
    return remove(by_length_.find(arrivals_.front()));
}

// The longest that fits; one does.
Sample Planner::take_longest(int64_t room) { return remove(std::prev(by_length_.upper_bound({-1, room, 0}))); }

Sample Planner::remove(ByLength::iterator found) {
    const Sample sample = *found;
    by_length_.erase(found);
    waiting_tokens_ -= sample.tokens;
    return sample;
}

Step Planner::make_step() {
    std::vector<Pack> packs(ranks_, Pack{token_budget_, 0, {}});
    while (const std::optional<Sample> sample = take_oldest(std::max_element(packs.begin(), packs.end(), tighter)->room))
        add_to(*(sample->patches ? fewest_patches(packs, sample->tokens)
                                 : &*std::max_element(packs.begin(), packs.end(), tighter)),
               *sample);
    while (!by_length_.empty()) {
        Pack* target = fewest_patches(packs, by_length_.begin()->tokens);
        if (target == nullptr) break;
        add_to(*target, take_longest(target->room));
    }
    balance(packs);
    Step step(ranks_);
    for (int64_t rank = 0; rank < ranks_; ++rank) {
        for (const Sample& each : packs[rank].samples) step[rank].push_back(each.index);
        std::sort(step[rank].begin(), step[rank].end());
    }
    return step;
}

std::vector<Step> plan_known(const Costs& costs, int64_t token_budget, int64_t ranks) {
    std::vector<Sample> samples;
    for (int64_t i = 0; i < costs.count; ++i)
        if (costs.tokens[i] <= token_budget) samples.push_back({i, costs.tokens[i], costs.patches[i]});
    std::stable_sort(samples.begin(), samples.end(),
                     [](const Sample& left, const Sample& right) { return left.tokens > right.tokens; });
    Planner planner(token_budget, ranks, 0);
    planner.restore(costs.count, samples);
    std::vector<Step> steps = planner.flush();
    const auto first = [](const Step& step) {
        int64_t least = INT64_MAX;
        for (const auto& pack : step)
            if (!pack.empty()) least = std::min(least, pack.front());
        return least;
    };
    if (!steps.empty())
        std::sort(steps.begin(), steps.end() - 1,
                  [&](const Step& left, const Step& right) { return first(left) < first(right); });
    return steps;
}

}  // namespace lynx
