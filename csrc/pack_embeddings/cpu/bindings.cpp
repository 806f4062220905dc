#include "common/bindings.h"

#include <tuple>

#include "embeddings.h"

namespace py = pybind11;

namespace lynx {
namespace {

using namespace embeddings;

// (address, dtype as a number of lynx::Dtype, rows, row stride in elements)
using RowsView = std::tuple<uintptr_t, int, int64_t, int64_t>;

Rows rows(const RowsView& view) {
    const auto [address, dtype, count, stride] = view;
    return {pointer<void>(address), static_cast<Dtype>(dtype), count, stride};
}

}  // namespace

void bind_embeddings(py::module_& module) {
    module.def("pack_embeddings", [](uintptr_t token_ids, uintptr_t vision_index, int64_t num_rows,
                                     const RowsView& embedding, const RowsView& vision, const RowsView& out,
                                     int64_t width, int threads) {
        py::gil_scoped_release release;
        pack_embeddings({pointer<int64_t>(token_ids), pointer<int32_t>(vision_index), num_rows}, rows(embedding),
                        rows(vision), rows(out), width, threads);
    });
    // The gradient of the table if `of_table`, else of the vision rows.
    module.def("sum_gradients", [](uintptr_t token_ids, uintptr_t vision_index, int64_t num_rows, bool of_table,
                                   const RowsView& grad, const RowsView& out, int64_t width, int threads) {
        py::gil_scoped_release release;
        sum_gradients({pointer<int64_t>(token_ids), pointer<int32_t>(vision_index), num_rows},
                      of_table ? Source::kTable : Source::kVision, rows(grad), rows(out), width, threads);
    });
}

}  // namespace lynx
