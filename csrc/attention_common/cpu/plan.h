// From a layout's table to the tasks that threads work on. Nothing here depends on the number of threads.
#pragma once

#include <vector>

#include "problem.h"

namespace lynx::attention {

// Runs and the keys they see. No run of another group sees these keys. Tiles must end at `cuts`: they go from the
// group's first key to behind its last one, and are fewer than two if it has no keys.
struct Group {
    std::vector<Run> runs;
    std::vector<int64_t> cuts;
};

// The groups of a layout, and the sizes that its table was checked against.
struct Layout {
    int64_t num_queries, num_keys;
    std::vector<Group> groups;
};

// `table` is PackedLayout.segments, (rows, 4). Throws std::invalid_argument if it does not describe `num_tokens`
// tokens.
Layout read_packed_layout(const int32_t* table, int64_t rows, int64_t num_tokens, bool root_is_causal);

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
