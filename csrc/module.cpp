// lynx_kernels._host: what runs on the host, for Python. It knows no tensors, only their addresses and strides; the
// modules in lynx_kernels that call it check shapes, dtypes and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "adapter/adapter.h"
#include "attention/attention.h"
#include "embeddings/embeddings.h"
#include "frames/frames.h"
#include "instruction_sets.h"
#include "planner/planner.h"
#include "threads.h"

namespace py = pybind11;

namespace {

// (address, row stride, head stride), strides in elements.
using View = std::tuple<uintptr_t, int64_t, int64_t>;

lynx::Matrix matrix(const View& view) {
    const auto [address, row_stride, head_stride] = view;
    return {reinterpret_cast<void*>(address), row_stride, head_stride};
}

// (address, dtype as a number of lynx::Dtype, rows, row stride in elements).
using RowsView = std::tuple<uintptr_t, int, int64_t, int64_t>;

lynx::Rows rows(const RowsView& view) {
    const auto [address, dtype, count, stride] = view;
    return {reinterpret_cast<void*>(address), static_cast<lynx::Dtype>(dtype), count, stride};
}

template <class Number>
Number* pointer(uintptr_t address) {
    return reinterpret_cast<Number*>(address);
}

lynx::Problem problem_of(const lynx::Layout& layout, const std::tuple<int64_t, int64_t, int64_t>& sizes, float scale,
                         bool is_bfloat16) {
    lynx::Problem problem = {};
    problem.num_queries = layout.num_queries;
    problem.num_keys = layout.num_keys;
    std::tie(problem.num_heads, problem.num_kv_heads, problem.head_dim) = sizes;
    problem.scale = scale;
    problem.is_bfloat16 = is_bfloat16;
    return problem;
}

// (address, whether it is bf16 and not fp32); the address is 0 where the argument is absent.
using Numbers = std::pair<uintptr_t, bool>;

lynx::Numbers numbers(const Numbers& given) { return {pointer<void>(given.first), given.second}; }

lynx::Activation activation_of(const std::string& name) {
    if (name == "silu") return lynx::Activation::kSilu;
    if (name == "relu") return lynx::Activation::kRelu;
    if (name == "gelu") return lynx::Activation::kGelu;
    if (name == "gelu_tanh") return lynx::Activation::kGeluTanh;
    throw std::invalid_argument("adapter: there is no activation '" + name + "' here");
}

lynx::LayerNorm layer_norm(int64_t tokens, int64_t width, const Numbers& x, uintptr_t mean, uintptr_t rstd,
                           uintptr_t weight) {
    lynx::LayerNorm norm = {};
    norm.tokens = tokens, norm.width = width;
    norm.x = numbers(x), norm.weight = pointer<float>(weight);
    norm.mean = pointer<float>(mean), norm.rstd = pointer<float>(rstd);
    return norm;
}

lynx::Costs costs(uintptr_t tokens, uintptr_t patches, int64_t count) {
    return {pointer<int64_t>(tokens), pointer<int64_t>(patches), count};
}

// (index, tokens, patches)
using SampleNumbers = std::tuple<int64_t, int64_t, int64_t>;

// Of a frame (address, row stride, column stride, channel stride), and (top, left, height, width) of what a box cuts out.
using FrameView = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
using Box = std::tuple<int64_t, int64_t, int64_t, int64_t>;

lynx::frames::Frame cut_out(const FrameView& view, const Box& box, bool is_flipped) {
    const auto [address, row_stride, column_stride, channel_stride] = view;
    const auto [top, left, height, width] = box;
    const uint8_t* first = pointer<uint8_t>(address) + top * row_stride + left * column_stride;
    return {first, row_stride, column_stride, channel_stride, height, width, is_flipped};
}

}  // namespace

PYBIND11_MODULE(_host, module) {
    lynx::watch_forks();
    module.def("instruction_sets", lynx::instruction_sets);
    module.def("instruction_set", lynx::instruction_set_name);
    module.def("force_instruction_set", lynx::force_instruction_set);

    py::class_<lynx::Layout>(module, "Layout");
    module.def("packed_layout", [](uintptr_t table, int64_t rows, int64_t num_tokens, bool root_is_causal) {
        return lynx::read_packed_layout(pointer<int32_t>(table), rows, num_tokens, root_is_causal);
    });
    module.def("span_layout", [](uintptr_t table, int64_t rows, int64_t num_queries, int64_t num_keys) {
        return lynx::read_span_layout(pointer<int32_t>(table), rows, num_queries, num_keys);
    });
    // `sizes` are the query heads, the key heads and the head dimension; dtypes are bf16 or fp32, LSEs fp32.
    module.def("attention_forward",
               [](const lynx::Layout& layout, const std::tuple<int64_t, int64_t, int64_t>& sizes, float scale,
                  bool is_bfloat16, const View& q, const View& k, const View& v, const View& out, uintptr_t lse,
                  int threads) {
                   lynx::Problem problem = problem_of(layout, sizes, scale, is_bfloat16);
                   problem.q = matrix(q), problem.k = matrix(k), problem.v = matrix(v);
                   problem.out = matrix(out), problem.lse = pointer<float>(lse);
                   py::gil_scoped_release release;
                   lynx::attention_forward(layout, problem, threads);
               });
    module.def("attention_backward",
               [](const lynx::Layout& layout, const std::tuple<int64_t, int64_t, int64_t>& sizes, float scale,
                  bool is_bfloat16, const View& grad, uintptr_t grad_lse, const View& out, uintptr_t lse,
                  const View& q, const View& k, const View& v, const View& grad_q, const View& grad_k,
                  const View& grad_v, int threads) {
                   lynx::Problem problem = problem_of(layout, sizes, scale, is_bfloat16);
                   problem.q = matrix(q), problem.k = matrix(k), problem.v = matrix(v);
                   problem.out = matrix(out), problem.lse = pointer<float>(lse);
                   problem.grad = matrix(grad), problem.grad_lse = pointer<float>(grad_lse);
                   problem.grad_q = matrix(grad_q), problem.grad_k = matrix(grad_k);
                   problem.grad_v = matrix(grad_v);
                   py::gil_scoped_release release;
                   lynx::attention_backward(layout, problem, threads);
               });

    // `sizes` are the tokens, the width and the bottleneck; statistics are fp32, and 0 without a LayerNorm.
    module.def("adapter_forward",
               [](const std::tuple<int64_t, int64_t, int64_t>& sizes, float eps, const std::string& activation,
                  const Numbers& x, const Numbers& norm_weight, const Numbers& norm_bias, const Numbers& down_weight,
                  const Numbers& down_bias, const Numbers& up_weight, const Numbers& up_bias, const Numbers& scale,
                  const Numbers& out, uintptr_t mean, uintptr_t rstd, const Numbers& preactivation, int threads) {
                   lynx::Adapter adapter = {};
                   std::tie(adapter.tokens, adapter.width, adapter.bottleneck) = sizes;
                   adapter.eps = eps, adapter.activation = activation_of(activation);
                   adapter.x = numbers(x), adapter.scale = numbers(scale);
                   adapter.norm_weight = numbers(norm_weight), adapter.norm_bias = numbers(norm_bias);
                   adapter.down_weight = numbers(down_weight), adapter.down_bias = numbers(down_bias);
                   adapter.up_weight = numbers(up_weight), adapter.up_bias = numbers(up_bias);
                   adapter.out = numbers(out), adapter.preactivation = numbers(preactivation);
                   adapter.mean = pointer<float>(mean), adapter.rstd = pointer<float>(rstd);
                   py::gil_scoped_release release;
                   lynx::adapter_forward(adapter, threads);
               });

    module.def("adapter_renormalize",
               [](int64_t tokens, int64_t width, const Numbers& x, uintptr_t mean, uintptr_t rstd, uintptr_t weight,
                  uintptr_t bias, const Numbers& normalized, int threads) {
                   lynx::LayerNorm norm = layer_norm(tokens, width, x, mean, rstd, weight);
                   norm.bias = pointer<float>(bias), norm.normalized = numbers(normalized);
                   py::gil_scoped_release release;
                   lynx::adapter_renormalize(norm, threads);
               });
    module.def("adapter_norm_backward",
               [](int64_t tokens, int64_t width, const Numbers& x, uintptr_t mean, uintptr_t rstd, uintptr_t weight,
                  const Numbers& normalized_grad, const Numbers& grad, const Numbers& x_grad,
                  uintptr_t weight_grad, uintptr_t bias_grad, int threads) {
                   lynx::LayerNorm norm = layer_norm(tokens, width, x, mean, rstd, weight);
                   norm.normalized_grad = numbers(normalized_grad), norm.grad = numbers(grad);
                   norm.x_grad = numbers(x_grad);
                   py::gil_scoped_release release;
                   lynx::adapter_norm_backward(norm, pointer<float>(weight_grad), pointer<float>(bias_grad), threads);
               });

    using Release = py::call_guard<py::gil_scoped_release>;
    py::class_<lynx::Planner>(module, "Planner")
        .def(py::init<int64_t, int64_t, int64_t>())
        .def("push",
             [](lynx::Planner& planner, uintptr_t tokens, uintptr_t patches, int64_t count) {
                 return planner.push(costs(tokens, patches, count));
             },
             Release())
        .def("flush", &lynx::Planner::flush, Release())
        .def_property_readonly("num_seen", &lynx::Planner::num_seen)
        .def("waiting",
             [](const lynx::Planner& planner) {
                 std::vector<SampleNumbers> found;
                 for (const lynx::Sample& each : planner.waiting())
                     found.emplace_back(each.index, each.tokens, each.patches);
                 return found;
             })
        .def("restore", [](lynx::Planner& planner, int64_t num_seen, const std::vector<SampleNumbers>& waiting) {
            std::vector<lynx::Sample> samples;
            for (const auto& [index, tokens, patches] : waiting) samples.push_back({index, tokens, patches});
            planner.restore(num_seen, samples);
        });
    module.def("plan_known",
               [](uintptr_t tokens, uintptr_t patches, int64_t count, int64_t token_budget, int64_t ranks) {
                   return lynx::plan_known(costs(tokens, patches, count), token_budget, ranks);
               },
               Release());

    module.def("pack_embeddings", [](uintptr_t token_ids, uintptr_t vision_index, int64_t num_rows,
                                     const RowsView& embedding, const RowsView& vision, const RowsView& out,
                                     int64_t width, int threads) {
        py::gil_scoped_release release;
        lynx::pack_embeddings({pointer<int64_t>(token_ids), pointer<int32_t>(vision_index), num_rows}, rows(embedding),
                              rows(vision), rows(out), width, threads);
    });
    // `of_table`: the gradient of the table, else of the vision rows.
    module.def("sum_gradients",
               [](uintptr_t token_ids, uintptr_t vision_index, int64_t num_rows, bool of_table, const RowsView& grad,
                  const RowsView& out, int64_t width, int threads) {
                   py::gil_scoped_release release;
                   lynx::sum_gradients({pointer<int64_t>(token_ids), pointer<int32_t>(vision_index), num_rows},
                                       of_table ? lynx::Source::kTable : lynx::Source::kVision, rows(grad), rows(out),
                                       width, threads);
               });

    py::enum_<lynx::frames::ElementType>(module, "ElementType")
        .value("float64", lynx::frames::ElementType::kFloat64)
        .value("float32", lynx::frames::ElementType::kFloat32)
        .value("float16", lynx::frames::ElementType::kFloat16)
        .value("bfloat16", lynx::frames::ElementType::kBFloat16);
    // `levels` (3, 256) and `out` are of `type`; boxes lie inside their frames.
    module.def("pack_frames",
               [](const std::vector<FrameView>& views, const std::vector<Box>& boxes, const std::vector<bool>& flips,
                  int64_t size, int64_t patch_size, bool is_exact, bool rounds_down, lynx::frames::ElementType type,
                  uintptr_t levels, const std::array<float, 3>& mean, const std::array<float, 3>& std, uintptr_t out,
                  int threads) {
                   std::vector<lynx::frames::Frame> frames;
                   for (size_t i = 0; i < views.size(); i++)
                       frames.push_back(cut_out(views[i], boxes.at(i), flips.at(i)));
                   const lynx::frames::Problem problem = {frames.data(),
                                                          static_cast<int64_t>(frames.size()),
                                                          size,
                                                          patch_size,
                                                          is_exact,
                                                          rounds_down,
                                                          type,
                                                          pointer<void>(levels),
                                                          {mean[0], mean[1], mean[2]},
                                                          {std[0], std[1], std[2]},
                                                          pointer<void>(out)};
                   py::gil_scoped_release release;
                   lynx::frames::pack_frames(problem, threads);
               });
}
