#include "common/bindings.h"

#include <tuple>
#include <vector>

#include "planner.h"

namespace py = pybind11;

namespace lynx {
namespace {

Costs costs(uintptr_t tokens, uintptr_t patches, int64_t count) {
    return {pointer<int64_t>(tokens), pointer<int64_t>(patches), count};
}

// (index, tokens, patches)
using SampleNumbers = std::tuple<int64_t, int64_t, int64_t>;

}  // namespace

void bind_planner(py::module_& module) {
    using Release = py::call_guard<py::gil_scoped_release>;
    py::class_<Planner>(module, "Planner")
        .def(py::init<int64_t, int64_t, int64_t>())
        .def("push",
             [](Planner& planner, uintptr_t tokens, uintptr_t patches, int64_t count) {
                 return planner.push(costs(tokens, patches, count));
             },
             Release())
        .def("flush", &Planner::flush, Release())
        .def_property_readonly("num_seen", &Planner::num_seen)
        .def("waiting",
             [](const Planner& planner) {
                 std::vector<SampleNumbers> found;
                 for (const Sample& each : planner.waiting())
                     found.emplace_back(each.index, each.tokens, each.patches);
                 return found;
             })
        .def("restore", [](Planner& planner, int64_t num_seen, const std::vector<SampleNumbers>& waiting) {
            std::vector<Sample> samples;
            for (const auto& [index, tokens, patches] : waiting) samples.push_back({index, tokens, patches});
            planner.restore(num_seen, samples);
        });
    module.def("plan_known",
               [](uintptr_t tokens, uintptr_t patches, int64_t count, int64_t token_budget, int64_t ranks) {
                   return plan_known(costs(tokens, patches, count), token_budget, ranks);
               },
               Release());
}

}  // namespace lynx
