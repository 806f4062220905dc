// Cuts a stream of samples into packs. lynx_kernels/packing/reference.py defines what is done and says why; this does
// the same, faster, and must give the very same packs.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <set>
#include <vector>

namespace lynx {

struct Sample {
    int64_t index;    // in the stream
    int64_t tokens;   // of the language model
    int64_t patches;  // of the vision tower
};

struct Pack {
    int64_t room;     // tokens that are left of the budget
    int64_t patches;  // of all samples
    std::vector<Sample> samples;
};

// The indices of each rank's samples, ascending.
using Step = std::vector<std::vector<int64_t>>;

// Where the costs of `count` samples stand.
struct Costs {
    const int64_t* tokens;
    const int64_t* patches;
    int64_t count;
};

class Planner {
  public:
    Planner(int64_t token_budget, int64_t ranks, int64_t lookahead);

    std::vector<Step> push(const Costs& costs);
    std::vector<Step> flush();

    int64_t num_seen() const { return num_seen_; }
    std::vector<Sample> waiting() const;  // in order of arrival
    void restore(int64_t num_seen, const std::vector<Sample>& waiting);
    bool is_empty() const { return by_length_.empty(); }
    std::vector<Pack> fill_packs();  // of the next step, not yet balanced; some sample must wait

  private:
    // Shortest first and, among equals, the newest first: so the last that fits is the one to take.
    struct Shorter {
        bool operator()(const Sample& left, const Sample& right) const {
            return left.tokens != right.tokens ? left.tokens < right.tokens : left.index > right.index;
        }
    };

    using ByLength = std::set<Sample, Shorter>;

    void add(const Sample& sample);
    std::optional<Sample> take_oldest(int64_t room);
    Sample take_longest(int64_t room);
    Sample remove(ByLength::iterator found);

    int64_t token_budget_, ranks_, enough_;
    int64_t num_seen_ = 0;
    int64_t waiting_tokens_ = 0;
    std::deque<Sample> arrivals_;  // those that were taken out of turn are still among them
    ByLength by_length_;
};

// Steps for samples that are all known.
std::vector<Step> plan_known(const Costs& costs, int64_t token_budget, int64_t ranks);

}  // namespace lynx
