#include "frames.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include "common/instruction_sets.h"
#include "common/integers.h"
#include "common/threads.h"
#include "pack_frames/filter.h"

namespace lynx::frames {

LYNX_CHOOSE_KERNELS(Kernels, pack_frames)

namespace {

// A Filter and its memory.
class OwnedFilter {
   public:
    OwnedFilter(const Side& side, bool is_mirrored, const Kernels& kernels)
        : side_(side),
          is_mirrored_(is_mirrored),
          kernels_(kernels),
          // A window may start anywhere in its first group.
          max_groups_(divide_up(max_inputs(side) + 3, 4)),
          first_(side.count),
          last_(side.count),
          words_(side.count * max_groups_ * kernels.weight_words) {}

    void fill() {
        for (int64_t output = 0; output < side_.count; output++) {
            const Window window = window_of(side_, is_mirrored_ ? side_.count - 1 - output : output);
            const int64_t end = window.first + window.count;
            first_[output] = window.first / 4;
            last_[output] = (end + 3) / 4;
            uint32_t* words = &words_[output * max_groups_ * kernels_.weight_words];
            for (int64_t group = first_[output]; group < last_[output]; group++) {
                int32_t four[4] = {};
                for (int64_t i = std::max(4 * group, window.first); i < std::min(4 * group + 4, end); i++)
                    four[i - 4 * group] = weight_of(window, i - window.first);
                kernels_.pack_weights(four, words);
                words += kernels_.weight_words;
            }
        }
    }

    Filter filter() const {
        const auto ends = std::minmax(first_.front(), first_.back());
        return {side_.count,  ends.first,    std::max(last_.front(), last_.back()),
                max_groups_,  first_.data(), last_.data(),
                words_.data()};
    }

   private:
    Side side_;
    bool is_mirrored_;
    const Kernels& kernels_;
    int64_t max_groups_;
    std::vector<int32_t> first_, last_;
    std::vector<uint32_t> words_;
};

// Every filter that frames need, once. All frames of a video need the same ones.
class Filters {
   public:
    explicit Filters(const Kernels& kernels) : kernels_(kernels) {}

    int64_t index_of(const Side& side, bool is_mirrored) {
        const auto key = 
            std::make_tuple(side.length, side.resized, side.start, side.count, side.resample, is_mirrored);
        const auto [found, is_new] = indices_.emplace(key, filters_.size());
        if (is_new) filters_.emplace_back(side, is_mirrored, kernels_);
        return found->second;
    }

    std::vector<Filter> fill(int threads) {
        parallel_for(filters_.size(), threads, 0, [&](int64_t i, void*) { filters_[i].fill(); });
        std::vector<Filter> filled;
        for (const OwnedFilter& each : filters_) filled.push_back(each.filter());
        return filled;
    }

   private:
    const Kernels& kernels_;
    std::map<std::tuple<int64_t, int64_t, int64_t, int64_t, Resample, bool>, int64_t> indices_;
    std::vector<OwnedFilter> filters_;
};

bool keeps_size(const Side& side) { return side.length == side.resized; }

// The rows where the tasks of one frame begin and end. Neighbouring tasks both filter the rows between them, so frames
// are cut only if there are fewer than two of them for each thread.
std::vector<int64_t> task_rows(const Problem& problem, int threads) {
    const int64_t wanted =
        threads == 1 ? 1 : divide_up(2 * threads, std::max<int64_t>(problem.num_frames, 1));
    std::vector<int64_t> rows = {0};
    for (int64_t row = 0; row < problem.grid.height;) {
        row = strip_end(row, problem.grid.patch_height);
        if (row * wanted >= problem.grid.height * static_cast<int64_t>(rows.size())) rows.push_back(row);
    }
    return rows;
}

}  // namespace

void pack_frames(const Problem& problem, int threads) {
    const Kernels& run = kernels();
    threads = usable_threads(threads);
    struct Indices {
        int64_t row_filter, column_filter;  // -1 if pixels are only copied
    };
    std::vector<Indices> indices;
    Filters filters(run);
    for (int64_t i = 0; i < problem.num_frames; i++) {
        const Resizing& resizing = problem.resizings[i];
        if (keeps_size(resizing.rows) && keeps_size(resizing.columns))
            indices.push_back({-1, -1});
        else
            indices.push_back({filters.index_of(resizing.rows, false),
                               filters.index_of(resizing.columns, problem.frames[i].is_flipped)});
    }
    const std::vector<Filter> filled = filters.fill(threads);

    const std::vector<int64_t> rows = task_rows(problem, threads);
    std::vector<Task> tasks;
    size_t scratch_bytes = 0;
    for (int64_t i = 0; i < problem.num_frames; i++) {
        const Resizing& resizing = problem.resizings[i];
        const bool is_copied = indices[i].row_filter < 0;
        for (size_t j = 0; j + 1 < rows.size(); j++) {
            const Task task = {&problem.frames[i],
                               is_copied ? nullptr : &filled[indices[i].row_filter],
                               is_copied ? nullptr : &filled[indices[i].column_filter],
                               resizing.is_vertical_first,
                               resizing.rows.start,
                               resizing.columns.start,
                               rows[j],
                               rows[j + 1],
                               i * problem.frame_stride};
            scratch_bytes = std::max(scratch_bytes, run.scratch_bytes(problem, task));
            tasks.push_back(task);
        }
    }
    const bool computes_levels = run.computes_levels(problem);
    parallel_for(tasks.size(), threads, scratch_bytes, [&](int64_t i, void* scratch) {
        run.run(problem, tasks[i], computes_levels, scratch);
    });
}

}  // namespace lynx::frames
