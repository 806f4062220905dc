// From a layout's table to the tasks that threads work on. Nothing here depends on the number of threads.
#pragma once

#include <vector>

#include "problem.h"

namespace lynx::attention {

// Keys that no tile crosses the ends of.
typedef Tile KeyRange;

// Runs, the keys they see, and the earlier runs' keys that each run sees. No run of another group sees these keys.
struct Group {
    std::vector<Run> runs;
    std::vector<KeyRange> keys;  // ascending
};

// The groups of a layout, and the sizes that its table was checked against.
struct Layout {
    int64_t num_queries, num_keys;
    std::vector<Group> groups;
    std::vector<int32_t> see_end, floor;  // as in Problem; empty for null
};

// The tables of a PackedLayout.
struct PackedTables {
    const int32_t* runs;  // (num_runs + 1, columns)
    int64_t num_runs, columns;
    const int32_t* tokens;    // (3, num_tokens)
    const int32_t* key_runs;  // (num_key_runs + 1,)
    int64_t num_key_runs;
    int64_t num_tokens;
    int64_t window, chunk;  // 0: none
};

// Throws std::invalid_argument if the tables do not describe `num_tokens` tokens.
Layout read_packed_layout(const PackedTables& tables);

// Likewise. `table` is SpanLayout.segments, (rows, 3).
Layout read_span_layout(const int32_t* table, int64_t rows, int64_t num_queries, int64_t num_keys);

// The tasks are in the order in which threads should take them: the longest first.
struct Plan {
    std::vector<Run> runs;
    std::vector<Tile> tiles;
    std::vector<Task> tasks;
    int64_t num_splits = 0;  // of the keys of the group that has most of them; 0 if no group is split
};

// A group of many queries becomes several tasks. Each reads all keys that its queries see.
Plan plan_forward(const Layout& layout, int64_t heads_per_kv_head);

// A group of many keys becomes several tasks. Each reads all queries that see its keys. Queries that see nothing and
// keys that nothing sees are in no task: their gradients are 0.
Plan plan_backward(const Layout& layout);

}  // namespace lynx::attention
