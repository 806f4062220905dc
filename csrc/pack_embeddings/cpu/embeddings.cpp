#include "embeddings.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/threads.h"

namespace lynx::embeddings {
namespace {

// The row of the source that is copied to `row`, or -1 if it comes from the other source.
int64_t index_of(const Sources& sources, Source source, int64_t row) {
    const int64_t vision_row = sources.vision_index[row];
    if (source == Source::kVision) return vision_row >= 0 ? vision_row : -1;
    return vision_row >= 0 ? -1 : sources.token_ids[row];
}

void check(const Sources& sources, Source source, int64_t size) {
    const bool is_table = source == Source::kTable;
    for (int64_t row = 0; row < sources.num_rows; row++) {
        if (is_table && sources.vision_index[row] >= 0) continue;
        const int64_t index = index_of(sources, source, row);
        if (index < (is_table ? 0 : -1) || index >= size)
            throw std::out_of_range(std::string("pack_embeddings: ") + (is_table ? "token_ids[" : "vision_index[") +
                                    std::to_string(row) + "] is " + std::to_string(index) + ", outside [0, " +
                                    std::to_string(size) + ")");
    }
}

template <class Element>
Element* row_of(const Rows& rows, int64_t row) {
    return static_cast<Element*>(rows.data) + row * rows.stride;
}

template <class To, class From>
void copy(const From* from, To* to, int64_t width) {
    if constexpr (std::is_same_v<To, From>) {
        memcpy(to, from, width * sizeof(To));
    } else {
        for (int64_t i = 0; i < width; i++) narrow(widen(from[i]), to[i]);
    }
}

// Where each row of a source was copied to: row i to rows[starts[i]] ... rows[starts[i + 1] - 1], which ascend.
struct Uses {
    std::vector<int64_t> starts, rows;

    Uses(const Sources& sources, Source source, int64_t size) : starts(size + 1), rows(sources.num_rows) {
        for (int64_t row = 0; row < sources.num_rows; row++)
            if (const int64_t index = index_of(sources, source, row); index >= 0) starts[index + 1]++;
        for (int64_t i = 0; i < size; i++) starts[i + 1] += starts[i];
        std::vector<int64_t> next = starts;
        for (int64_t row = 0; row < sources.num_rows; row++)
            if (const int64_t index = index_of(sources, source, row); index >= 0) rows[next[index]++] = row;
    }
};

template <class To, class From>
void sum(const int64_t* first, const int64_t* last, const Rows& grad, To* out, int64_t width) {
    if (first == last) {
        std::fill_n(reinterpret_cast<char*>(out), width * sizeof(To), 0);
        return;
    }
    if (first + 1 == last) return copy(row_of<From>(grad, *first), out, width);
    constexpr int64_t kColumns = 1024;  // 4 KiB of sums stay in the L1 cache
    float sums[kColumns];
    for (int64_t column = 0; column < width; column += kColumns) {
        const int64_t columns = std::min(kColumns, width - column);
        std::fill_n(sums, columns, 0.0f);
        for (const int64_t* row = first; row != last; row++) {
            const From* from = row_of<From>(grad, *row) + column;
            for (int64_t i = 0; i < columns; i++) sums[i] += widen(from[i]);
        }
        for (int64_t i = 0; i < columns; i++) narrow(sums[i], out[column + i]);
    }
}

}  // namespace

void pack_embeddings(const Sources& sources, const Rows& embedding, const Rows& vision, const Rows& out, int64_t width,
                     int threads) {
    check(sources, Source::kTable, embedding.count);
    check(sources, Source::kVision, vision.count);
    if (width == 0) return;  // data may be null
    with_type(embedding.dtype, [&](auto table_type) {
        with_type(vision.dtype, [&](auto vision_type) {
            using Table = decltype(table_type);
            using Vision = decltype(vision_type);
            const int count = threads_for_bytes(sources.num_rows * width * sizeof(Table), threads);
#pragma omp parallel for num_threads(count) schedule(static)
            for (int64_t row = 0; row < sources.num_rows; row++) {
                Table* to = row_of<Table>(out, row);
                const int64_t vision_row = sources.vision_index[row];
                if (vision_row >= 0)
                    copy(row_of<Vision>(vision, vision_row), to, width);
                else
                    copy(row_of<Table>(embedding, sources.token_ids[row]), to, width);
            }
        });
    });
}

void sum_gradients(const Sources& sources, Source source, const Rows& grad, const Rows& out, int64_t width,
                   int threads) {
    check(sources, source, out.count);
    if (width == 0) return;
    const Uses uses(sources, source, out.count);
    with_type(grad.dtype, [&](auto grad_type) {
        with_type(out.dtype, [&](auto out_type) {
            using From = decltype(grad_type);
            using To = decltype(out_type);
            const int count = threads_for_bytes((sources.num_rows + out.count) * width * sizeof(To), threads);
            // Sixteen rows at a time, because rows of a table are used very unevenly.
#pragma omp parallel for num_threads(count) schedule(dynamic, 16)
            for (int64_t i = 0; i < out.count; i++)
                sum<To, From>(uses.rows.data() + uses.starts[i], uses.rows.data() + uses.starts[i + 1], grad,
                              row_of<To>(out, i), width);
        });
    });
}

}  // namespace lynx::embeddings
