// From a layout's table to the units that threads work on. Nothing here depends on how many threads there are.
#pragma once

#include <vector>

#include "problem.h"

namespace lynx {

// Runs and keys that have to do with each other: nothing outside a group sees inside it. `cuts` are the keys where tiles
// must end, from the group's first key to its end; fewer than two where it has no keys.
struct Group {
    std::vector<Run> runs;
    std::vector<int64_t> cuts;
};

// The groups of a layout and the sizes its table is checked against.
struct Layout {
    int64_t num_queries, num_keys;
    std::vector<Group> groups;
};

// `table` is PackedLayout.segments, (rows, 4). Throws std::invalid_argument where it does not describe `num_tokens`.
Layout read_packed_layout(const int32_t* table, int64_t rows, int64_t num_tokens, bool root_is_causal);

// `table` is SpanLayout.segments, (rows, 3), likewise.
Layout read_span_layout(const int32_t* table, int64_t rows, int64_t num_queries, int64_t num_keys);

// Units in the order in which threads should take them: the longest first.
struct Plan {
    std::vector<Run> runs;
    std::vector<Tile> tiles;
    std::vector<Unit> units;
    int64_t parts = 0;  // of the keys of the group that is split into most; 0 where none is split
};

// Groups of many queries become several units; each reads all keys its queries see.
Plan plan_forward(const Layout& layout, int64_t heads_per_kv_head);

// Groups of many keys become several units; each reads all queries that see its keys. Queries and keys that see nothing
// or that nothing sees are in no unit: their gradients are 0.
Plan plan_backward(const Layout& layout);

}  // namespace lynx
