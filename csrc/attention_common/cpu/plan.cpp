#include "plan.h"

#include <algorithm>

#include "common/integers.h"
#include "visibility.h"

namespace lynx::attention {
namespace {

constexpr int64_t kTaskRows = 512;     // query rows of a forward task, about: packing its keys costs little beside them
constexpr int64_t kTaskKeys = 1024;    // keys of a backward task, about
constexpr int64_t kMaxSplits = 4;      // each costs a copy of dq in fp32
constexpr int64_t kTileMultiple = 16;  // lanes of the widest vector

// Cuts a range of keys into as few tiles of at most `block_n` keys as possible, all of about the same size.
void add_tiles(const KeyRange& keys, const std::vector<int32_t>& see_end, int64_t block_n, std::vector<Tile>& tiles) {
    const int64_t each = round_up(divide_up(keys.end - keys.begin, divide_up(keys.end - keys.begin, block_n)),
                                  kTileMultiple);
    for (Tile tile = keys; tile.begin < keys.end; tile.begin = tile.end) {
        tile.end = std::min(keys.end, tile.begin + each);
        if (!see_end.empty())  // earlier queries see the range, but not so far; `see_end` rises along the run
            tile.first_query = std::upper_bound(see_end.begin() + keys.first_query, see_end.begin() + tile.begin,
                                                tile.begin) - see_end.begin();
        tiles.push_back(tile);
    }
}

// Rows that share a word of a bf16 product belong to one run.
void add_run(Run run, Plan& plan) {
    if (!plan.runs.empty()) {
        const Run& before = plan.runs.back();
        run.row = before.row + round_up(before.last_query - before.first_query, 2);
    }
    plan.runs.push_back(run);
}

std::vector<Tile> tiles_of(const Layout& layout, const Group& group, int64_t block_n) {
    std::vector<Tile> tiles;
    for (const KeyRange& keys : group.keys) add_tiles(keys, layout.see_end, block_n, tiles);
    return tiles;
}

double pairs_seen(const View& view) {
    if (view.first_query >= view.last_query) return 0;
    const double first = view.keys_seen(view.first_query), last = view.keys_seen(view.last_query - 1);
    const double queries = view.last_query - view.first_query;
    // A causal rule adds a key with every query, until the whole tile is seen.
    const double rising = std::min(queries, last - first);
    return queries * last - rising * (last - first) / 2;
}

void add_task(const Layout& layout, Plan& plan, Task task) {
    Problem problem = {};
    problem.runs = plan.runs.data();
    problem.see_end = layout.see_end.empty() ? nullptr : layout.see_end.data();
    problem.floor = layout.floor.empty() ? nullptr : layout.floor.data();
    for (int64_t t = task.first_tile; t < task.last_tile; t++) {
        const Tile& tile = plan.tiles[t];
        for (int64_t i = first_run_of(problem, task, tile);
             i < task.last_run && problem.runs[i].first_query < tile.last_query; i++)
            task.cost += pairs_seen(view_of(problem, problem.runs[i], tile));
    }
    plan.tasks.push_back(task);
}

void sort_tasks(Plan& plan) {
    std::stable_sort(plan.tasks.begin(), plan.tasks.end(),
                     [](const Task& a, const Task& b) { return a.cost > b.cost; });
}

// Adds the tiles that the runs from `first_run` on see, and the task. `tiles` are those of the group.
void add_forward_task(const Layout& layout, const std::vector<Tile>& tiles, int64_t first_run, Plan& plan) {
    const int64_t first_tile = plan.tiles.size(), last_run = plan.runs.size();
    const int64_t first_query = plan.runs[first_run].first_query, last_query = plan.runs[last_run - 1].last_query;
    const auto is_seen = [&](const Tile& tile) {  // true of all tiles of a SpanLayout
        return tile.first_query < last_query && first_query < tile.last_query;
    };
    std::copy_if(tiles.begin(), tiles.end(), std::back_inserter(plan.tiles), is_seen);
    add_task(layout, plan, {first_run, last_run, first_tile, static_cast<int64_t>(plan.tiles.size()), 0, false, 0});
}

}  // namespace

Plan plan_forward(const Layout& layout, int64_t heads_per_kv_head) {
    Plan plan;
    const int64_t max_queries = std::max<int64_t>(1, kTaskRows / heads_per_kv_head);
    for (const Group& group : layout.groups) {
        const std::vector<Tile> tiles = tiles_of(layout, group, kForwardBlockN);
        int64_t queries = 0;
        for (const Run& run : group.runs) queries += run.last_query - run.first_query;
        const int64_t each = divide_up(queries, divide_up(queries, max_queries));
        int64_t first_run = plan.runs.size(), room = each;
        for (Run run : group.runs) {
            const int64_t last_query = run.last_query;
            while (run.first_query < last_query) {
                run.last_query = std::min(last_query, run.first_query + room);
                room -= run.last_query - run.first_query;
                add_run(run, plan);
                run.first_query = run.last_query;
                if (room == 0) {
                    add_forward_task(layout, tiles, first_run, plan);
                    first_run = plan.runs.size();
                    room = each;
                }
            }
        }
        if (first_run < static_cast<int64_t>(plan.runs.size())) add_forward_task(layout, tiles, first_run, plan);
    }
    sort_tasks(plan);
    return plan;
}

Plan plan_backward(const Layout& layout) {
    Plan plan;
    for (const Group& group : layout.groups) {
        const int64_t first_run = plan.runs.size(), first_tile = plan.tiles.size();
        for (const Run& run : group.runs) add_run(run, plan);
        const std::vector<Tile> group_tiles = tiles_of(layout, group, kBackwardBlockN);
        plan.tiles.insert(plan.tiles.end(), group_tiles.begin(), group_tiles.end());
        const int64_t last_run = plan.runs.size(), tiles = group_tiles.size();
        if (tiles == 0) continue;  // no keys, so no gradients
        const int64_t keys = group_tiles.back().end - group_tiles.front().begin;
        const int64_t num_splits = std::min({kMaxSplits, divide_up(keys, kTaskKeys), tiles});
        for (int64_t split = 0; split < num_splits; split++) {
            Task task = {first_run, last_run, first_tile + tiles * split / num_splits,
                         first_tile + tiles * (split + 1) / num_splits, split, num_splits > 1, 0};
            int64_t last_query = 0;
            for (int64_t t = task.first_tile; t < task.last_tile; t++)
                last_query = std::max(last_query, plan.tiles[t].last_query);
            const int64_t first_query = plan.tiles[task.first_tile].first_query;
            while (plan.runs[task.first_run].last_query <= first_query) task.first_run++;
            while (plan.runs[task.last_run - 1].first_query >= last_query) task.last_run--;
            add_task(layout, plan, task);
        }
        if (num_splits > 1) plan.num_splits = std::max(plan.num_splits, num_splits);
    }
    sort_tasks(plan);
    return plan;
}

}  // namespace lynx::attention
