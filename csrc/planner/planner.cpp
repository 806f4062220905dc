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

Step balanced(std::vector<Pack> packs) {
    balance(packs);
    Step step;
    for (const Pack& pack : packs) {
        std::vector<int64_t>& indices = step.emplace_back();
        for (const Sample& each : pack.samples) indices.push_back(each.index);
        std::sort(indices.begin(), indices.end());
    }
    return step;
}

// The index of a step's first sample. No pack is empty.
int64_t first_of(const Step& step) {
    int64_t least = step[0][0];
    for (const std::vector<int64_t>& pack : step) least = std::min(least, pack[0]);
    return least;
}

Planner waiting_longest_first(std::vector<Sample> samples, int64_t token_budget, int64_t ranks) {
    std::sort(samples.begin(), samples.end(), [](const Sample& left, const Sample& right) {
        return left.tokens != right.tokens ? left.tokens > right.tokens : left.index < right.index;
    });
    Planner planner(token_budget, ranks, 0);
    planner.restore(0, samples);
    return planner;
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
        while (waiting_tokens_ >= enough_) steps.push_back(balanced(fill_packs()));
    }
    return steps;
}

std::vector<Step> Planner::flush() {
    std::vector<Step> steps;
    while (!by_length_.empty()) steps.push_back(balanced(fill_packs()));
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

std::vector<Pack> Planner::fill_packs() {
    std::vector<Pack> packs(ranks_, Pack{token_budget_, 0, {}});
    const int64_t average = waiting_tokens_ / static_cast<int64_t>(by_length_.size());
    const int64_t kept = ranks_ * std::min(average * 3 / 2, token_budget_ * 3 / 4);  // room for what is chosen
    for (int64_t room = ranks_ * token_budget_; room > kept;) {
        Pack& roomiest = *std::max_element(packs.begin(), packs.end(), tighter);
        const std::optional<Sample> sample = take_oldest(roomiest.room);
        if (!sample) break;
        add_to(sample->patches ? *fewest_patches(packs, sample->tokens) : roomiest, *sample);
        room -= sample->tokens;
    }
    while (!by_length_.empty()) {
        Pack* target = fewest_patches(packs, by_length_.begin()->tokens);
        if (target == nullptr) break;
        add_to(*target, take_longest(target->room));
    }
    return packs;
}

std::vector<Step> plan_known(const Costs& costs, int64_t token_budget, int64_t ranks) {
    std::vector<Sample> samples;
    for (int64_t i = 0; i < costs.count; ++i)
        if (costs.tokens[i] <= token_budget) samples.push_back({i, costs.tokens[i], costs.patches[i]});
    Planner filling = waiting_longest_first(std::move(samples), token_budget, 1);
    std::vector<Pack> packs;
    while (!filling.is_empty()) packs.push_back(std::move(filling.fill_packs()[0]));
    std::stable_sort(packs.begin(), packs.end(),
                     [](const Pack& left, const Pack& right) { return left.patches > right.patches; });
    std::vector<Step> steps;
    const auto full = packs.end() - static_cast<int64_t>(packs.size()) % ranks;
    for (auto first = packs.begin(); first != full; first += ranks)
        steps.push_back(balanced({std::make_move_iterator(first), std::make_move_iterator(first + ranks)}));
    std::sort(steps.begin(), steps.end(),
              [](const Step& left, const Step& right) { return first_of(left) < first_of(right); });
    std::vector<Sample> rest;
    for (auto pack = full; pack != packs.end(); ++pack)
        rest.insert(rest.end(), pack->samples.begin(), pack->samples.end());
    for (Step& step : waiting_longest_first(std::move(rest), token_budget, ranks).flush())
        steps.push_back(std::move(step));
    return steps;
}

}  // namespace lynx
