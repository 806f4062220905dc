// lynx_kernels._host: what runs on a CPU, for Python.
#include "bindings.h"
#include "instruction_sets.h"
#include "threads.h"

PYBIND11_MODULE(_host, module) {
    lynx::watch_forks();
    module.def("instruction_sets", lynx::instruction_sets);
    module.def("instruction_set", lynx::instruction_set_name);
    module.def("force_instruction_set", lynx::force_instruction_set);
    lynx::bind_adapter(module);
    lynx::bind_attention(module);
    lynx::bind_decode(module);
    lynx::bind_embeddings(module);
    lynx::bind_frames(module);
}
