// pack_embeddings with random sizes, strides and dtypes, and some indices out of range, against the simplest
// implementation.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "pack_embeddings/cpu/embeddings.h"
#include "fuzz.h"

namespace {

using namespace lynx;
using namespace lynx::embeddings;

float value_at(const Rows& rows, int64_t row, int64_t column) {
    float value = 0;
    with_type(rows.dtype, [&](auto type) {
        value = widen(static_cast<const decltype(type)*>(rows.data)[row * rows.stride + column]);
    });
    return value;
}

float rounded(float value, Dtype dtype) {
    with_type(dtype, [&](auto type) {
        narrow(value, type);
        value = widen(type);
    });
    return value;
}

// Rows of numbers between -2 and 2. The memory holds nothing else.
struct Table {
    std::vector<uint8_t> memory;
    Rows rows;

    Table(Random& random, Dtype dtype, int64_t count, int64_t width) {
        const int64_t stride = width + (random.flag() ? 0 : random.number(1, 9));
        const int64_t elements = count == 0 ? 0 : (count - 1) * stride + width;
        memory.resize(elements * (dtype == Dtype::kFloat ? 4 : 2));
        rows = {memory.data(), dtype, count, stride};
        with_type(dtype, [&](auto type) {
            for (int64_t i = 0; i < elements; i++) {
                narrow(random.number(-1000, 1000) / 500.0f, type);
                static_cast<decltype(type)*>(rows.data)[i] = type;
            }
        });
    }
};

struct Indices {
    std::vector<int64_t> token_ids;
    std::vector<int32_t> vision_index;
    bool are_right = true;

    Indices(Random& random, int64_t count, int64_t vocabulary, int64_t num_vision)
        : token_ids(count), vision_index(count) {
        for (int64_t i = 0; i < count; i++) {
            const bool is_vision = vocabulary == 0 || (num_vision > 0 && random.flag());
            token_ids[i] = is_vision ? random.number(-5, 1 << 20) : random.number(0, vocabulary - 1);
            vision_index[i] = is_vision ? random.number(0, num_vision - 1) : -random.number(1, 9);
        }
        if (count == 0 || random.number(0, 9) != 0) return;
        const int64_t wrong = random.number(0, count - 1);
        are_right = false;
        if (vision_index[wrong] >= 0)
            vision_index[wrong] = num_vision + random.number(0, 3);
        else
            token_ids[wrong] = random.flag() ? -random.number(1, 9) : vocabulary + random.number(0, 3);
    }
};

void check_sums(const Sources& sources, Source source, const Rows& grad, const Rows& out, int64_t width) {
    for (int64_t i = 0; i < out.count; i++)
        for (int64_t column = 0; column < width; column++) {
            double sum = 0, magnitude = 0;
            for (int64_t row = 0; row < sources.num_rows; row++) {
                const int64_t vision_row = sources.vision_index[row];
                const bool is_used = source == Source::kVision ? vision_row == i
                                                               : vision_row < 0 && sources.token_ids[row] == i;
                if (!is_used) continue;
                sum += value_at(grad, row, column);
                magnitude += std::fabs(value_at(grad, row, column));
            }
            if (!(std::fabs(value_at(out, i, column) - sum) <= 1e-5 * magnitude + 0.004 * std::fabs(sum)))
                fail("pack_embeddings", "a gradient is not the sum of its rows");
        }
}

}  // namespace

void fuzz_embeddings(uint64_t seed) {
    Random random(seed);
    auto any_dtype = [&] { return static_cast<Dtype>(random.number(0, 2)); };
    const Dtype table_dtype = any_dtype(), vision_dtype = any_dtype();
    const int64_t vocabulary = random.number(0, 9), num_vision = random.number(vocabulary == 0 ? 1 : 0, 9);
    const int64_t count = random.number(0, 40), width = random.number(0, random.flag() ? 20 : 2100);
    const Table embedding(random, table_dtype, vocabulary, width), vision(random, vision_dtype, num_vision, width);
    const Table out(random, table_dtype, count, width), grad(random, table_dtype, count, width);
    const Indices indices(random, count, vocabulary, num_vision);
    const Sources sources = {indices.token_ids.data(), indices.vision_index.data(), count};
    const int threads = random.number(1, 3);
    try {
        pack_embeddings(sources, embedding.rows, vision.rows, out.rows, width, threads);
        if (!indices.are_right) fail("pack_embeddings", "an index that is out of range is not rejected");
    } catch (const std::out_of_range&) {
        if (indices.are_right) fail("pack_embeddings", "an index that is in range is rejected");
        return;
    }
    for (int64_t row = 0; row < count; row++)
        for (int64_t column = 0; column < width; column++) {
            const int64_t vision_row = indices.vision_index[row];
            const float expected = vision_row >= 0 ? value_at(vision.rows, vision_row, column)
                                                : value_at(embedding.rows, indices.token_ids[row], column);
            if (value_at(out.rows, row, column) != rounded(expected, table_dtype)) fail("pack_embeddings", "a row is not a copy");
        }
    const Table grad_table(random, table_dtype, vocabulary, width);
    const Table grad_vision(random, vision_dtype, num_vision, width);
    sum_gradients(sources, Source::kTable, grad.rows, grad_table.rows, width, threads);
    check_sums(sources, Source::kTable, grad.rows, grad_table.rows, width);
    sum_gradients(sources, Source::kVision, grad.rows, grad_vision.rows, width, threads);
    check_sums(sources, Source::kVision, grad.rows, grad_vision.rows, width);
}
