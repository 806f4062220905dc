// pack_embeddings on CPUs, on several threads. Shapes: T rows, V rows of the table, M vision rows, width d.
#pragma once

#include "pack_embeddings/rows.h"

namespace lynx {

// Row t is vision[vision_index[t]] where that is >= 0, else embedding[token_ids[t]].
struct Sources {
    const int64_t* token_ids;     // (T,)
    const int32_t* vision_index;  // (T,)
    int64_t num_rows;
};

enum class Source { kTable, kVision };

// Both throw std::out_of_range for an index that no row has. Results do not depend on `threads`.
void pack_embeddings(const Sources& sources, const Rows& embedding, const Rows& vision, const Rows& out, int64_t width,
                     int threads);

// The gradient of the table or of the vision rows: into each row of `out` the sum, in fp32 and in their order, of the
// rows of `grad` that it went to; 0 where it went nowhere.
void sum_gradients(const Sources& sources, Source source, const Rows& grad, const Rows& out, int64_t width,
                   int threads);

}  // namespace lynx
