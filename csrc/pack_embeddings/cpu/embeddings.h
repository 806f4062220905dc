// pack_embeddings on a CPU, on several threads. Shapes: T rows, V rows of the table, M vision rows, width d.
#pragma once

#include "pack_embeddings/rows.h"

namespace lynx::embeddings {

// Row t is vision[vision_index[t]] if vision_index[t] >= 0, else embedding[token_ids[t]].
struct Sources {
    const int64_t* token_ids;     // (T,)
    const int32_t* vision_index;  // (T,)
    int64_t num_rows;
};

enum class Source { kTable, kVision };

// Both throw std::out_of_range if an index is. Results do not depend on `threads`.
void pack_embeddings(const Sources& sources, const Rows& embedding, const Rows& vision, const Rows& out, int64_t width,
                     int threads);

// The gradient of the table or of the vision rows. A row of `out` is the sum of the rows of `grad` that it was copied
// to, in fp32 and in their order, or 0 if it was not copied.
void sum_gradients(const Sources& sources, Source source, const Rows& grad, const Rows& out, int64_t width,
                   int threads);

}  // namespace lynx::embeddings
