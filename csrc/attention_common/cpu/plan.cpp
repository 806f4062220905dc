#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/integers.h"
#include "visibility.h"

namespace lynx::attention {
namespace {

constexpr int64_t kTaskRows = 512;     // query rows of a forward task, about: packing its keys costs little beside them
constexpr int64_t kTaskKeys = 1024;    // keys of a backward task, about
constexpr int64_t kMaxSplits = 4;      // each costs a copy of dq in fp32
constexpr int64_t kTileMultiple = 16;  // lanes of the widest vector

[[noreturn]] void reject(int64_t row, const std::string& why) {
    throw std::invalid_argument("row " + std::to_string(row) + " of the layout's segments " + why);
}

// Cuts [begin, end) into as few tiles of at most `block_n` keys as possible, all of about the same size.
void add_tiles(int64_t begin, int64_t end, int64_t block_n, std::vector<Tile>& tiles) {
    const int64_t count = divide_up(end - begin, block_n);
    if (count == 0) return;
    const int64_t each = round_up(divide_up(end - begin, count), kTileMultiple);
    for (; begin < end; begin += each) tiles.push_back({begin, std::min(end, begin + each)});
}

void add_tiles(const Group& group, int64_t block_n, std::vector<Tile>& tiles) {
    for (size_t i = 1; i < group.cuts.size(); i++) add_tiles(group.cuts[i - 1], group.cuts[i], block_n, tiles);
}

double pairs_seen(const Run& run, const Tile& tile) {
    const View view = view_of(run, tile);
    if (view.first_query >= run.last_query) return 0;
    const double first = view.keys_seen(view.first_query), last = view.keys_seen(run.last_query - 1);
    const double queries = run.last_query - view.first_query;
    // A causal rule adds a key with every query, until the whole tile is seen.
    const double rising = std::min(queries, last - first);
    return queries * last - rising * (last - first) / 2;
}

void add_task(Plan& plan, Task task) {
    for (int64_t i = task.first_run; i < task.last_run; i++)
        for (int64_t t = task.first_tile; t < task.last_tile; t++)
            task.cost += pairs_seen(plan.runs[i], plan.tiles[t]);
    plan.tasks.push_back(task);
}

void sort_tasks(Plan& plan) {
    std::stable_sort(plan.tasks.begin(), plan.tasks.end(),
                     [](const Task& a, const Task& b) { return a.cost > b.cost; });
}

}  // namespace

Layout read_packed_layout(const int32_t* table, int64_t rows, int64_t num_tokens, bool root_is_causal) {
    Layout layout = {num_tokens, num_tokens, {}};
    if (rows < 1 || table[0] != 0 || table[4 * (rows - 1)] != num_tokens)
        throw std::invalid_argument("the layout's segments do not run from 0 to " + std::to_string(num_tokens));
    int64_t group_start = -1;
    for (int64_t row = 0; row + 1 < rows; row++) {
        const int64_t start = table[4 * row], end = table[4 * row + 4];
        const int64_t root_start = table[4 * row + 1], root_end = table[4 * row + 2], group_end = table[4 * row + 3];
        if (end < start) reject(row, "ends before it starts");
        if (start == end) continue;
        const bool in_root = start < root_end;
        if (root_start < 0 || root_start > start || root_end < root_start || group_end < end || root_end > group_end ||
            group_end > num_tokens || (in_root && (start != root_start || end != root_end)))
            reject(row, "is not a segment of a group");
        if (root_start != group_start) layout.groups.push_back({{}, {root_start}});
        group_start = root_start;
        Group& group = layout.groups.back();
        const int64_t full_end = in_root && !root_is_causal ? end : start;
        if (!in_root && end == group_end && start == root_end && group.runs.size() == 1) {
            // The only branch of a root sees keys without a gap, so both are one run.
            group.runs[0].last_query = group.runs[0].own_end = end;
            group.cuts.back() = end;
            continue;
        }
        const int64_t shared_end = in_root ? root_start : root_end;
        group.runs.push_back({start, end, root_start, shared_end, start, end, full_end});
        group.cuts.push_back(end);
    }
    return layout;
}

Layout read_span_layout(const int32_t* table, int64_t rows, int64_t num_queries, int64_t num_keys) {
    Layout layout = {num_queries, num_keys, {}};
    if (rows < 1 || table[0] != 0 || table[3 * (rows - 1)] != num_queries)
        throw std::invalid_argument("the layout's segments do not run from 0 to " + std::to_string(num_queries));
    std::vector<Run> runs;
    for (int64_t row = 0; row + 1 < rows; row++) {
        const int64_t start = table[3 * row], end = table[3 * row + 3];
        const int64_t first_key = table[3 * row + 1], last_key = table[3 * row + 2];
        if (end < start) reject(row, "ends before it starts");
        if (first_key < 0 || last_key < first_key || last_key > num_keys)
            reject(row, "sees keys outside 0 to " + std::to_string(num_keys));
        if (start == end) continue;
        const Run run = {start, end, first_key, last_key, 0, 0, 0};
        if (first_key == last_key)
            layout.groups.push_back({{run}, {}});
        else
            runs.push_back(run);
    }
    // Segments whose spans overlap, directly or through other spans, are a group.
    std::stable_sort(runs.begin(), runs.end(),
                     [](const Run& a, const Run& b) { return a.shared_begin < b.shared_begin; });
    int64_t group_end = 0;
    for (const Run& run : runs) {
        if (run.shared_begin >= group_end) layout.groups.emplace_back();
        Group& group = layout.groups.back();
        group.runs.push_back(run);
        group.cuts.push_back(run.shared_begin);
        group.cuts.push_back(run.shared_end);
        group_end = std::max(group_end, run.shared_end);
    }
    for (Group& group : layout.groups) {
        std::sort(group.cuts.begin(), group.cuts.end());
        group.cuts.erase(std::unique(group.cuts.begin(), group.cuts.end()), group.cuts.end());
    }
    return layout;
}

Plan plan_forward(const Layout& layout, int64_t heads_per_kv_head) {
    Plan plan;
    const int64_t max_queries = std::max<int64_t>(1, kTaskRows / heads_per_kv_head);
    for (const Group& group : layout.groups) {
        const int64_t first_tile = plan.tiles.size();
        add_tiles(group, kForwardBlockN, plan.tiles);
        const int64_t last_tile = plan.tiles.size();
        int64_t queries = 0;
        for (const Run& run : group.runs) queries += run.last_query - run.first_query;
        const int64_t each = divide_up(queries, divide_up(queries, max_queries));
        int64_t first_run = plan.runs.size(), room = each;
        for (Run run : group.runs) {
            const int64_t last_query = run.last_query;
            while (run.first_query < last_query) {
                run.last_query = std::min(last_query, run.first_query + room);
                room -= run.last_query - run.first_query;
                plan.runs.push_back(run);
                // Behind its last query, a part of a run sees only what the whole run sees.
                Run& part = plan.runs.back();
                part.own_end = std::min(part.own_end, std::max(part.full_end, part.last_query));
                run.first_query = run.last_query;
                if (room == 0) {
                    const int64_t last_run = plan.runs.size();
                    add_task(plan, {first_run, last_run, first_tile, last_tile, 0, false, 0});
                    first_run = last_run;
                    room = each;
                }
            }
        }
        const int64_t last_run = plan.runs.size();
        if (first_run < last_run) add_task(plan, {first_run, last_run, first_tile, last_tile, 0, false, 0});
    }
    sort_tasks(plan);
    return plan;
}

Plan plan_backward(const Layout& layout) {
    Plan plan;
    for (const Group& group : layout.groups) {
        const int64_t first_run = plan.runs.size(), first_tile = plan.tiles.size();
        plan.runs.insert(plan.runs.end(), group.runs.begin(), group.runs.end());
        add_tiles(group, kBackwardBlockN, plan.tiles);
        const int64_t last_run = plan.runs.size(), last_tile = plan.tiles.size();
        if (first_tile == last_tile) continue;  // no keys, so no gradients
        const int64_t keys = group.cuts.back() - group.cuts.front();
        const int64_t tiles = last_tile - first_tile;
        const int64_t num_splits = std::min({kMaxSplits, divide_up(keys, kTaskKeys), tiles});
        for (int64_t split = 0; split < num_splits; split++)
            add_task(plan, {first_run, last_run, first_tile + tiles * split / num_splits,
                            first_tile + tiles * (split + 1) / num_splits, split, num_splits > 1, 0});
        if (num_splits > 1) plan.num_splits = std::max(plan.num_splits, num_splits);
    }
    sort_tasks(plan);
    return plan;
}

}  // namespace lynx::attention
