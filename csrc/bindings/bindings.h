// The parts of the extension module; each is in a file of its own.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace mimo_ext::bindings {

void register_row_shards(pybind11::module_& m);
void register_core(pybind11::module_& m);
void register_comm(pybind11::module_& m);

}  // namespace mimo_ext::bindings
