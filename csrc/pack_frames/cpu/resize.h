// Both passes of resizing, over rolling rows. The horizontal pass filters blocks of kWidth rows, one row a lane. The
// vertical pass filters every output row, one column a lane, from a ring of rows.
//
// The pass that comes second takes the bytes of the first. With the horizontal pass first, blocks of input rows go
// through it into the ring; with the vertical one first, input rows go into the ring, and blocks of output rows through
// the horizontal pass.
//
// Products take four bytes of a lane at a time (dot.h): four neighbours of a row in the horizontal pass, four
// neighbours of a column in the vertical one. So the ring holds words of four rows.
#pragma once

#include "common/workspace.h"
#include "dot.h"
#include "pixels.h"
#include "problem.h"

namespace {

constexpr int kBlockGroups = kWidth / 4;  // groups of four rows that a block has
#if defined(__AVX512F__)
constexpr int kColumnVectors = 4;  // outputs of the vertical pass at a time, so that weights are loaded less often
#else
constexpr int kColumnVectors = 2;
#endif

struct ResizeScratch {
    int64_t columns;      // inputs of a row that are read, rounded up to vectors of groups
    int64_t stride;       // of an output row of one channel
    int64_t ring_stride;  // of a row of one channel between the passes
    int64_t ring_groups;  // of four rows; with the horizontal pass first, whole blocks
    uint8_t* inputs;      // (4, 3, columns), with the vertical pass first: a group of input rows
    uint8_t* planes;      // (kWidth, 3, columns): a block's rows before the horizontal pass
    Words* block;         // (3, columns / 4): a row's group of four columns in each lane
    uint8_t* filtered;    // (3, stride, kWidth): a block after the horizontal pass
    uint32_t* ring;       // (ring_groups, 3, ring_stride) words of four rows
    const uint32_t** lines;  // (row_filter->max_groups,): the lines of the ring that an output row needs

    ResizeScratch(Workspace& workspace, const lynx::frames::Task& task, int64_t stride)
        : columns(round_up(4 * (task.column_filter->end - task.column_filter->begin), 4 * kWidth)),
          stride(stride),
          ring_stride(task.is_vertical_first ? columns : stride),
          ring_groups(task.is_vertical_first
                          ? task.row_filter->max_groups
                          : round_up(task.row_filter->max_groups + kBlockGroups - 1, kBlockGroups)) {
        inputs = workspace.take<uint8_t>(task.is_vertical_first ? 4 * 3 * columns : 0);
        planes = workspace.take<uint8_t>(kWidth * 3 * columns);
        block = workspace.take<Words>(3 * columns / 4);
        filtered = workspace.take<uint8_t>(3 * stride * kWidth);
        ring = workspace.take<uint32_t>(ring_groups * 3 * ring_stride);
        lines = workspace.take<const uint32_t*>(task.row_filter->max_groups);
    }

    uint32_t* line(int64_t group, int channel) const { return ring + (group % ring_groups * 3 + channel) * ring_stride; }
};

// What both orders share.
class Passes {
   protected:
    Passes(const lynx::frames::Task& task, const ResizeScratch& scratch)
        : frame_(*task.frame),
          row_filter_(*task.row_filter),
          column_filter_(*task.column_filter),
          scratch_(scratch),
          first_group_(row_filter_.first[task.first_row]),
          next_group_(first_group_) {}

    // Reads the needed pixels of an input row into three planes.
    void read_input(int64_t row, uint8_t* to) const {
        const int64_t plane = scratch_.columns, first_column = 4 * column_filter_.begin;
        const int64_t columns = min(4 * column_filter_.end, frame_.width) - first_column;
        read_row(frame_, row, first_column, columns, {to, to + plane, to + 2 * plane});
    }

    // The vertical pass: makes one output row, (3, ring_stride), of groups that are in the ring.
    void filter_row(int64_t row, uint8_t* to) const {
        const int64_t first = row_filter_.first[row], count = row_filter_.last[row] - first;
        for (int64_t i = 0; i < count; i++) scratch_.lines[i] = scratch_.line(first + i - first_group_, 0);
        const uint32_t* weights = row_filter_.words + row * row_filter_.max_groups * kWeightWords;
        const int64_t width = 3 * scratch_.ring_stride;
        int64_t column = 0;
        for (; column + kColumnVectors * kWidth <= width; column += kColumnVectors * kWidth)
            filter_columns<kColumnVectors>(count, weights, column, to);
        for (; column < width; column += kWidth) filter_columns<1>(count, weights, column, to);
    }

    // The horizontal pass: filters the planes.
    void filter_planes() const {
        const int64_t plane = scratch_.columns;
        for (int64_t i = 0; i < 3 * plane / 4; i += kWidth) {
            Words tile[kWidth];
            for (int lane = 0; lane < kWidth; lane++)
                tile[lane] = load_vector<Words>(scratch_.planes + lane * 3 * plane + 4 * i);
            transpose(tile);
            for (int group = 0; group < kWidth; group++) scratch_.block[i + group] = tile[group];
        }
        filter_block();
    }

    const lynx::frames::Frame& frame_;
    const lynx::frames::Filter& row_filter_;
    const lynx::frames::Filter& column_filter_;
    const ResizeScratch& scratch_;
    const int64_t first_group_;  // of the task: the ring starts with it
    int64_t next_group_;         // the first one that is not in the ring yet

   private:
    template <int kVectors>
    LYNX_INLINE void filter_columns(int64_t count, const uint32_t* weights, int64_t column, uint8_t* to) const {
        Words sums[kVectors][kSums];
        for (auto& each : sums) start_sums(each);
        for (int64_t i = 0; i < count; i++) {
            Words four[kWeightWords];
            broadcast_weights(four, weights + i * kWeightWords);
            for (int j = 0; j < kVectors; j++)
                add_products(sums[j], load_vector<Words>(scratch_.lines[i] + column + j * kWidth), four);
        }
        for (int j = 0; j < kVectors; j++) store_vector(to + column + j * kWidth, bytes_of(sums[j]));
    }

    // Members are copied to local variables, here and above. Stores of bytes may alias them, so the compiler would load
    // them again after each store.
    void filter_block() const {
        const lynx::frames::Filter filter = column_filter_;
        const int64_t plane = scratch_.columns / 4, filtered_plane = scratch_.stride * kWidth;
        const Words* const block = scratch_.block;
        uint8_t* to = scratch_.filtered;
        const uint32_t* weights = filter.words;
        for (int64_t column = 0; column < filter.count; column++, to += kWidth) {
            Words sums[3][kSums];
            for (auto& each : sums) start_sums(each);
            const int64_t first = filter.first[column], count = filter.last[column] - first;
            const Words* groups = block + first - filter.begin;
            for (int64_t i = 0; i < count; i++) {
                Words four[kWeightWords];
                broadcast_weights(four, weights + i * kWeightWords);
                for (int channel = 0; channel < 3; channel++)
                    add_products(sums[channel], groups[channel * plane + i], four);
            }
            for (int channel = 0; channel < 3; channel++)
                store_vector(to + channel * filtered_plane, bytes_of(sums[channel]));
            weights += filter.max_groups * kWeightWords;
        }
    }
};

class HorizontalFirst : Passes {
   public:
    HorizontalFirst(const lynx::frames::Task& task, const ResizeScratch& scratch) : Passes(task, scratch) {}

    // Makes one output row, (3, stride). Call it for the rows from top to bottom.
    void row(int64_t row, uint8_t* to) {
        while (next_group_ < row_filter_.last[row]) next_block();
        filter_row(row, to);
    }

   private:
    // Takes the next kWidth rows through the horizontal pass into the ring. Rows below the crop are left uninitialised,
    // because their weight in the vertical pass is 0.
    void next_block() {
        const int64_t rows = min(frame_.height - 4 * next_group_, kWidth);
        for (int64_t lane = 0; lane < rows; lane++)
            read_input(4 * next_group_ + lane, scratch_.planes + lane * 3 * scratch_.columns);
        filter_planes();
        const int64_t count = column_filter_.count;
        for (int channel = 0; channel < 3; channel++)
            for (int group = 0; group < kBlockGroups; group++) {
                uint32_t* line = scratch_.line(next_group_ - first_group_ + group, channel);
                const uint8_t* from = scratch_.filtered + channel * scratch_.stride * kWidth + 4 * group;
                for (int64_t column = 0; column < count; column++)
                    memcpy(line + column, from + column * kWidth, 4);
            }
        next_group_ += kBlockGroups;
    }
};

class VerticalFirst : Passes {
   public:
    VerticalFirst(const lynx::frames::Task& task, const ResizeScratch& scratch)
        : Passes(task, scratch), last_row_(task.last_row), first_(task.first_row), end_(task.first_row) {}

    // As HorizontalFirst's.
    void row(int64_t row, uint8_t* to) {
        if (row == end_) next_block(row);
        const int64_t count = column_filter_.count, stride = scratch_.stride;
        const uint8_t* from = scratch_.filtered + row - first_;
        for (int channel = 0; channel < 3; channel++)
            for (int64_t column = 0; column < count; column++)
                to[channel * stride + column] = from[(channel * stride + column) * kWidth];
    }

   private:
    // Takes the next kWidth output rows, or what the task has left of them, through both passes.
    void next_block(int64_t row) {
        first_ = row;
        end_ = min(row + kWidth, last_row_);
        for (; row < end_; row++) {
            while (next_group_ < row_filter_.last[row]) next_group();
            filter_row(row, scratch_.planes + (row - first_) * 3 * scratch_.columns);
        }
        filter_planes();
    }

    // Takes four input rows into the ring. Those below the crop are left uninitialised: their weight is 0.
    void next_group() {
        const int64_t width = 3 * scratch_.columns, rows = min(frame_.height - 4 * next_group_, 4);
        uint8_t* const inputs = scratch_.inputs;
        for (int64_t i = 0; i < rows; i++) read_input(4 * next_group_ + i, inputs + i * width);
        uint32_t* line = scratch_.line(next_group_ - first_group_, 0);
        for (int64_t i = 0; i < width; i += kWidth) {
            Words four = {};
            for (int j = 0; j < 4; j++) four |= (Words)widen(load_vector<Bytes>(inputs + j * width + i)) << 8 * j;
            store_vector(line + i, four);
        }
        next_group_++;
    }

    const int64_t last_row_;
    int64_t first_, end_;  // the output rows of the block
};

}  // namespace
