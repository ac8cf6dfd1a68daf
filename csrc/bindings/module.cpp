// mimo_ext._C
#include "bindings/bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ side of mimo_ext; the public names are in the package mimo_ext.";
  m.attr("TORCH_VERSION") = MIMO_EXT_TORCH_VERSION;
#ifdef MIMO_EXT_WITH_CUDA
  m.attr("WITH_CUDA") = true;
#else
  m.attr("WITH_CUDA") = false;
#endif
  mimo_ext::bindings::register_row_shards(m);
  mimo_ext::bindings::register_core(m);
  mimo_ext::bindings::register_comm(m);
}
