// Which queries of a run see which keys of a tile.
#pragma once

#include "problem.h"

namespace {

// What a run sees of a tile.
struct View {
    int64_t first_query;  // the queries before it see nothing of the tile; last_query where none sees anything
    int64_t size;         // keys of the tile
    int64_t full;         // keys that all of the queries see
    int64_t offset;       // query q sees the tile's keys before q + offset, too

    // How many of the tile's keys query q sees: the first ones. Grows with q.
    int64_t keys_seen(int64_t query) const {
        const int64_t causal = query + offset;
        const int64_t keys = causal > full ? causal : full;
        return keys < size ? keys : size;
    }
};

inline View view_of(const lynx::Run& run, const lynx::Tile& tile) {
    const int64_t size = tile.end - tile.begin;
    if (run.shared_begin <= tile.begin && tile.end <= run.shared_end) return {run.first_query, size, size, 0};
    if (run.own_begin <= tile.begin && tile.begin < run.own_end) {
        const int64_t full = run.full_end > tile.begin ? run.full_end - tile.begin : 0;
        const bool all_see = full > 0 || run.first_query > tile.begin;
        return {all_see ? run.first_query : tile.begin, size, full, 1 - tile.begin};
    }
    return {run.last_query, size, 0, 0};
}

}  // namespace
