#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "visibility.h"

namespace lynx {
namespace {

constexpr int64_t kUnitRows = 512;    // query rows of a forward unit, about: packing its keys then costs little beside it
constexpr int64_t kUnitKeys = 1024;   // keys of a backward unit, about
constexpr int64_t kMostParts = 4;     // each costs a fp32 copy of the gradient of q
constexpr int64_t kTileMultiple = 16;  // lanes of the widest vector

[[noreturn]] void refuse(int64_t row, const std::string& why) {
    throw std::invalid_argument("row " + std::to_string(row) + " of the layout's segments " + why);
}

// Cut [begin, end) into as few tiles as `most` keys allow, of about one size.
void add_tiles(int64_t begin, int64_t end, int64_t most, std::vector<Tile>& tiles) {
    const int64_t count = (end - begin + most - 1) / most;
    if (count == 0) return;
    const int64_t each = (end - begin + count * kTileMultiple - 1) / (count * kTileMultiple) * kTileMultiple;
    for (; begin < end; begin += each) tiles.push_back({begin, std::min(end, begin + each)});
}

void add_tiles(const Group& group, int64_t most, std::vector<Tile>& tiles) {
    for (size_t i = 1; i < group.cuts.size(); i++) add_tiles(group.cuts[i - 1], group.cuts[i], most, tiles);
}

double pairs_seen(const Run& run, const Tile& tile) {
    const View view = view_of(run, tile);
    if (view.first_query >= run.last_query) return 0;
    const double first = view.keys_seen(view.first_query), last = view.keys_seen(run.last_query - 1);
    const double queries = run.last_query - view.first_query;
    // A causal rule adds a key a query until the tile is seen whole.
    const double rising = std::min(queries, last - first);
    return queries * last - rising * (last - first) / 2;
}

void add_unit(Plan& plan, Unit unit) {
    for (int64_t i = unit.first_run; i < unit.last_run; i++)
        for (int64_t t = unit.first_tile; t < unit.last_tile; t++)
            unit.cost += pairs_seen(plan.runs[i], plan.tiles[t]);
    plan.units.push_back(unit);
}

void sort_units(Plan& plan) {
    std::stable_sort(plan.units.begin(), plan.units.end(),
                     [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
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
        if (end < start) refuse(row, "ends before it starts");
        if (start == end) continue;
        const bool in_root = start < root_end;
        if (root_start < 0 || root_start > start || root_end < root_start || group_end < end || root_end > group_end ||
            group_end > num_tokens || (in_root && (start != root_start || end != root_end)))
            refuse(row, "is no segment of a group");
        if (root_start != group_start) layout.groups.push_back({{}, {root_start}});
        group_start = root_start;
        Group& group = layout.groups.back();
        const int64_t full_end = in_root && !root_is_causal ? end : start;
        if (!in_root && end == group_end && start == root_end && group.runs.size() == 1) {
            // The only branch of its root sees keys without a gap: both are one run.
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
        if (end < start) refuse(row, "ends before it starts");
        if (first_key < 0 || last_key < first_key || last_key > num_keys)
            refuse(row, "sees keys outside 0 to " + std::to_string(num_keys));
        if (start == end) continue;
        const Run run = {start, end, first_key, last_key, 0, 0, 0};
        if (first_key == last_key)
            layout.groups.push_back({{run}, {}});
        else
            runs.push_back(run);
    }
    // Segments whose spans overlap, directly or through others, are a group.
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
    const int64_t most_queries = std::max<int64_t>(1, kUnitRows / heads_per_kv_head);
    for (const Group& group : layout.groups) {
        const int64_t first_tile = plan.tiles.size();
        add_tiles(group, kForwardTile, plan.tiles);
        const int64_t last_tile = plan.tiles.size();
        int64_t queries = 0;
        for (const Run& run : group.runs) queries += run.last_query - run.first_query;
        const int64_t units = (queries + most_queries - 1) / most_queries;
        const int64_t each = (queries + units - 1) / units;
        int64_t first_run = plan.runs.size(), room = each;
        for (Run run : group.runs) {
            const int64_t last_query = run.last_query;
            while (run.first_query < last_query) {
                run.last_query = std::min(last_query, run.first_query + room);
                room -= run.last_query - run.first_query;
                plan.runs.push_back(run);
                // A part sees nothing behind its last query but what all of the run see.
                Run& part = plan.runs.back();
                part.own_end = std::min(part.own_end, std::max(part.full_end, part.last_query));
                run.first_query = run.last_query;
                if (room == 0) {
                    const int64_t last_run = plan.runs.size();
                    add_unit(plan, {first_run, last_run, first_tile, last_tile, 0, false, 0});
                    first_run = last_run;
                    room = each;
                }
            }
        }
        const int64_t last_run = plan.runs.size();
        if (first_run < last_run) add_unit(plan, {first_run, last_run, first_tile, last_tile, 0, false, 0});
    }
    sort_units(plan);
    return plan;
}

Plan plan_backward(const Layout& layout) {
    Plan plan;
    for (const Group& group : layout.groups) {
        const int64_t first_run = plan.runs.size(), first_tile = plan.tiles.size();
        plan.runs.insert(plan.runs.end(), group.runs.begin(), group.runs.end());
        add_tiles(group, kBackwardTile, plan.tiles);
        const int64_t last_run = plan.runs.size(), last_tile = plan.tiles.size();
        if (first_tile == last_tile) continue;  // no keys, and no gradients
        const int64_t keys = group.cuts.back() - group.cuts.front();
        const int64_t parts = std::min({kMostParts, (keys + kUnitKeys - 1) / kUnitKeys, last_tile - first_tile});
        for (int64_t part = 0; part < parts; part++)
            add_unit(plan, {first_run, last_run, first_tile + (last_tile - first_tile) * part / parts,
                            first_tile + (last_tile - first_tile) * (part + 1) / parts, part, parts > 1, 0});
        if (parts > 1) plan.parts = std::max(plan.parts, parts);
    }
    sort_units(plan);
    return plan;
}

}  // namespace lynx
