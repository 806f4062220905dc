// Which queries of a run see which keys of a tile.
#pragma once

#include "problem.h"

namespace {

// What a run sees of a tile. Both bounds of the keys that a query sees rise with the query.
struct View {
    int64_t first_query, last_query;  // the others see nothing of the tile
    int64_t begin, size;              // of the tile
    const int32_t* see_end;           // null: every query sees the keys up to the tile's end
    const int32_t* floor;             // null: every query sees the keys from the tile's begin on
    int64_t offset;

    int64_t clamped(int64_t key) const { return key < 0 ? 0 : key < size ? key : size; }

    // The query sees the keys `keys_unseen(query) <= key < keys_seen(query)` of the tile.
    int64_t keys_seen(int64_t query) const { return see_end == nullptr ? size : clamped(see_end[query] - begin); }
    int64_t keys_unseen(int64_t query) const { return floor == nullptr ? 0 : clamped(floor[query] + offset - begin); }

    // Whether the queries from `first` to `last` see the whole tile.
    bool is_unmasked(int64_t first, int64_t last) const { return keys_seen(first) == size && keys_unseen(last) == 0; }
};

inline View view_of(const lynx::attention::Problem& problem, const lynx::attention::Run& run,
                    const lynx::attention::Tile& tile) {
    View view = {run.first_query > tile.first_query ? run.first_query : tile.first_query,
                 run.last_query < tile.last_query ? run.last_query : tile.last_query,
                 tile.begin,
                 tile.end - tile.begin,
                 run.id == tile.run ? problem.see_end : nullptr,
                 problem.floor,
                 tile.offset};
    if (tile.begin < run.key_begin || tile.end > run.key_end || view.first_query >= view.last_query) {
        view.last_query = view.first_query;
        return view;
    }
    if (view.floor != nullptr) {  // behind the first query whose window the tile does not reach, no query sees it
        int64_t low = view.first_query, high = view.last_query;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (view.keys_unseen(middle) == view.size)
                high = middle;
            else
                low = middle + 1;
        }
        view.last_query = low;
    }
    return view;
}

// The first run of the task that may see the tile. The ones behind it may as long as they begin before tile.last_query.
inline int64_t first_run_of(const lynx::attention::Problem& problem, const lynx::attention::Task& task,
                            const lynx::attention::Tile& tile) {
    int64_t low = task.first_run, high = task.last_run;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (problem.runs[middle].last_query > tile.first_query)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

}  // namespace
