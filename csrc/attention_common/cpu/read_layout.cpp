// From a layout's table, which may be made by hand and wrong, to groups of runs and keys.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "plan.h"

namespace lynx::attention {
namespace {

constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

[[noreturn]] void reject(const std::string& what, int64_t index, const std::string& why) {
    throw std::invalid_argument(what + " " + std::to_string(index) + " of the layout " + why);
}

void require(bool holds, const char* what, int64_t index, const char* why) {
    if (!holds) reject(what, index, why);
}

// The row of a run in the table.
struct RunRow {
    const int32_t* row;
    int64_t columns;

    int64_t start() const { return row[0]; }
    int64_t end() const { return row[columns]; }
    int64_t offset() const { return row[1]; }
    bool begins_tree() const {
        for (int64_t column = 3; column < columns; column += 3)
            if (row[column] < row[column + 1]) return false;
        return true;
    }
};

void check_run(const RunRow& run, int64_t index) {
    const char* what = "run";
    require(run.start() <= run.end(), what, index, "ends before it starts");
    require(0 <= run.offset() && run.offset() <= run.start(), what, index, "has an offset that is not in its rows");
    for (int64_t column = 3; column < run.columns; column += 3) {
        const int64_t begin = run.row[column], end = run.row[column + 1], offset = run.row[column + 2];
        require(0 <= begin && begin <= end && end <= run.start(), what, index, "sees rows that are not before it");
        require(0 <= offset && offset <= begin, what, index, "sees a run whose offset is not in its rows");
    }
}

// The rows of a run: what each sees rises along it, and so does what sees it.
void check_tokens(const PackedTables& tables, const RunRow& run, int64_t tree_end) {
    const int32_t *first = tables.tokens, *see_end = first + tables.num_tokens, *last = see_end + tables.num_tokens;
    bool is_right = true;
    for (int64_t row = run.start(); row < run.end(); row++) {
        is_right &= run.start() <= first[row] && first[row] <= row && row < see_end[row] && see_end[row] <= run.end();
        is_right &= run.end() <= last[row] && last[row] <= tree_end;
        // The last key that it sees is seen from it on, and the next one is not.
        is_right = is_right && first[see_end[row] - 1] <= row;
        is_right = is_right && (see_end[row] == run.end() || row < first[see_end[row]]);
        if (row > run.start())
            is_right &= first[row - 1] <= first[row] && see_end[row - 1] <= see_end[row] && last[row] <= last[row - 1];
    }
    require(is_right, "the run from row", run.start(), "has tokens that see, or are seen by, rows they cannot");
}

}  // namespace

Layout read_packed_layout(const PackedTables& tables) {
    const auto& [runs, num_runs, columns, tokens, key_runs, num_key_runs, num_tokens, window, chunk] = tables;
    if (num_runs < 0 || columns < 3 || columns % 3 != 0 || runs[0] != 0 || runs[num_runs * columns] != num_tokens)
        throw std::invalid_argument("the layout's runs do not go from 0 to " + std::to_string(num_tokens));
    if (num_key_runs < 0 || key_runs[0] != 0 || key_runs[num_key_runs] != num_tokens)
        throw std::invalid_argument("the layout's key_runs do not go from 0 to " + std::to_string(num_tokens));
    const int32_t *first = tokens, *see_end = first + num_tokens, *last = see_end + num_tokens;
    Layout layout = {num_tokens, num_tokens, {}, {see_end, see_end + num_tokens}, {}};
    if (window > 0 || chunk > 0) layout.floor.resize(num_tokens);

    std::vector<int64_t> trees;  // first rows
    for (int64_t i = 0; i < num_runs; i++) {
        const RunRow run = {runs + i * columns, columns};
        check_run(run, i);
        if (run.begins_tree() && run.start() < run.end()) trees.push_back(run.start());
    }
    trees.push_back(num_tokens);
    int64_t key_run = 0, tree = -1;
    for (int64_t i = 0; i < num_runs; i++) {
        const RunRow run = {runs + i * columns, columns};
        if (run.start() == run.end()) continue;
        if (run.begins_tree()) {
            layout.groups.emplace_back();
            tree++;
        }
        require(tree >= 0, "run", i, "sees others but none is before it");
        check_tokens(tables, run, trees[tree + 1]);
        Group& group = layout.groups.back();
        group.runs.push_back({run.start(), run.end(), 0, kAll, i, 0});
        for (int64_t begin = run.start(); begin < run.end();) {
            while (key_run < num_key_runs && key_runs[key_run + 1] <= begin) {
                require(key_runs[key_run] <= key_runs[key_run + 1], "key run", key_run, "ends before it starts");
                key_run++;
            }
            const int64_t end = key_run < num_key_runs ? key_runs[key_run + 1] : begin;
            require(key_runs[key_run] == begin && begin < end && end <= run.end() && last[begin] == last[end - 1],
                    "key run", key_run, "is not a part of a run whose keys have one last query");
            group.keys.push_back({begin, end, i, run.offset(), first[begin], last[begin]});
            begin = end;
        }
        if (layout.floor.empty()) continue;
        for (int64_t row = run.start(); row < run.end(); row++) {
            const int64_t place = row - run.offset();
            const int64_t local = window > 0 ? std::max<int64_t>(0, place - window + 1) : place / chunk * chunk;
            layout.floor[row] = std::min<int64_t>(local, first[row] - run.offset());
        }
    }
    return layout;
}

Layout read_span_layout(const int32_t* table, int64_t rows, int64_t num_queries, int64_t num_keys) {
    Layout layout = {num_queries, num_keys, {}, {}, {}};
    if (rows < 1 || table[0] != 0 || table[3 * (rows - 1)] != num_queries)
        throw std::invalid_argument("the layout's segments do not run from 0 to " + std::to_string(num_queries));
    std::vector<Run> runs;
    for (int64_t row = 0; row + 1 < rows; row++) {
        const int64_t start = table[3 * row], end = table[3 * row + 3];
        const int64_t first_key = table[3 * row + 1], last_key = table[3 * row + 2];
        require(start <= end, "segment", row, "ends before it starts");
        if (first_key < 0 || last_key < first_key || last_key > num_keys)
            reject("segment", row, "sees keys outside 0 to " + std::to_string(num_keys));
        if (start == end) continue;
        const Run run = {start, end, first_key, last_key, row, 0};
        if (first_key == last_key)
            layout.groups.push_back({{run}, {}});
        else
            runs.push_back(run);
    }
    // Segments whose spans overlap, directly or through other spans, are a group.
    std::stable_sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.key_begin < b.key_begin; });
    std::vector<std::vector<int64_t>> cuts;  // of each of these groups: tiles end where a span begins or ends
    const size_t others = layout.groups.size();
    int64_t group_end = 0;
    for (const Run& run : runs) {
        if (run.key_begin >= group_end) {
            layout.groups.emplace_back();
            cuts.emplace_back();
        }
        layout.groups.back().runs.push_back(run);
        cuts.back().push_back(run.key_begin);
        cuts.back().push_back(run.key_end);
        group_end = std::max(group_end, run.key_end);
    }
    for (size_t i = 0; i < cuts.size(); i++) {
        std::sort(cuts[i].begin(), cuts[i].end());
        cuts[i].erase(std::unique(cuts[i].begin(), cuts[i].end()), cuts[i].end());
        for (size_t cut = 1; cut < cuts[i].size(); cut++)
            layout.groups[others + i].keys.push_back({cuts[i][cut - 1], cuts[i][cut], -1, 0, 0, kAll});
    }
    return layout;
}

}  // namespace lynx::attention
