// Which queries of a run see which keys of a tile.
#pragma once

#include "problem.h"

namespace {

// What a run sees of a tile.
struct View {
    int64_t first_query;  // earlier queries see nothing of the tile; last_query if no query sees anything
    int64_t size;         // keys of the tile
    int64_t full;         // keys that all of the queries see
    int64_t offset;       // query q also sees the tile's keys before q + offset

    // How many of the tile's keys query q sees. They are the first ones, and more of them the larger q is.
    int64_t keys_seen(int64_t query) const {
        const int64_t causal = query + offset;
        const int64_t keys = causal > full ? causal : full;
        return keys < size ? keys : size;
    }

    // Whether this query and all later ones see the whole tile.
    bool is_unmasked_from(int64_t query) const { return keys_seen(query) == size; }
};

inline View view_of(const lynx::attention::Run& run, const lynx::attention::Tile& tile) {
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
