// mimo_ext._C
#include <ATen/core/dispatch/Dispatcher.h>

#include "bindings/bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ side of mimo_ext; the public names are in the package mimo_ext.";
  m.attr("TORCH_VERSION") = MIMO_EXT_TORCH_VERSION;
  // Asked rather than defined: the same objects are linked with and without the CUDA kernels.
  m.attr("WITH_CUDA") = c10::Dispatcher::singleton()
                            .findSchemaOrThrow("mimo_ext::rescale_", "")
                            .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  mimo_ext::bindings::register_row_shards(m);
  mimo_ext::bindings::register_core(m);
  mimo_ext::bindings::register_comm(m);
}
