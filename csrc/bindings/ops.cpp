// Schemas of the ops and the registrations that hold on every device. The kernels of a device register themselves in
// its folder (ops/cpu, ops/cuda); fakes and the autograd formulas of the functional ops are in mimo_ext/ops.py.

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <initializer_list>
#include <tuple>

#include "ops/pack.h"
#include "ops/rescale.h"

namespace mimo_ext {
namespace {

// Ops that write into their arguments have no gradient: where autograd would lose one, they refuse.

void refuse_grad(const char* op, const char* instead, at::TensorList tensors) {
  if (!at::GradMode::is_enabled()) return;
  for (const at::Tensor& t : tensors) {
    TORCH_CHECK(!t.requires_grad(), op, ": expected tensors that do not require grad, got one of shape ", t.sizes(),
                " that does. Autograd does not see this op: ", instead, " or call it under torch.no_grad().");
  }
}

void bump_version(const at::Tensor& t) {
  t.unsafeGetTensorImpl()->bump_version();
}

// Two kernels for each such op: "Autograd" where gradients are tracked, "ADInplaceOrView" where they are not
// (torch.inference_mode) and a tensor still counts its versions. The functions of ops/ run below both.

void pack_into_versioned(const at::Tensor& buffer, const at::Tensor& x, at::IntArrayRef starts, at::IntArrayRef sizes) {
  ops::pack_into(buffer, x, starts, sizes);
  bump_version(buffer);
}

void pack_into_autograd(const at::Tensor& buffer, const at::Tensor& x, at::IntArrayRef starts, at::IntArrayRef sizes) {
  refuse_grad("pack_into", "use pack", {buffer, x});
  pack_into_versioned(buffer, x, starts, sizes);
}

void unpack_versioned(const at::Tensor& out, const at::Tensor& buffer, at::IntArrayRef starts, at::IntArrayRef sizes,
                      bool accumulate) {
  ops::unpack_(out, buffer, starts, sizes, accumulate);
  bump_version(out);
}

void unpack_autograd(const at::Tensor& out, const at::Tensor& buffer, at::IntArrayRef starts, at::IntArrayRef sizes,
                     bool accumulate) {
  refuse_grad("unpack_", "use unpack", {out, buffer});
  unpack_versioned(out, buffer, starts, sizes, accumulate);
}

std::tuple<at::Tensor, at::Tensor> rescale_versioned(at::TensorList buffers, const at::Tensor& factor, bool with_sumsq,
                                                     bool with_found_inf) {
  auto result = ops::rescale_(buffers, factor, with_sumsq, with_found_inf);
  for (const at::Tensor& t : buffers) bump_version(t);
  return result;
}

std::tuple<at::Tensor, at::Tensor> rescale_autograd(at::TensorList buffers, const at::Tensor& factor, bool with_sumsq,
                                                    bool with_found_inf) {
  refuse_grad("rescale_", "multiply", buffers);
  refuse_grad("rescale_", "multiply", {factor});
  return rescale_versioned(buffers, factor, with_sumsq, with_found_inf);
}

}  // namespace

// "Tensor(a!)" marks an argument that the op writes to. Boxes are flat lists, see ops/pack.h.
TORCH_LIBRARY(mimo_ext, m) {
  // The boxes of a tensor, one after another, as a new buffer.
  m.def(
      "pack("
      "Tensor x, "
      "SymInt[] starts, "
      "SymInt[] sizes, "
      "ScalarType? dtype=None"
      ") -> Tensor");

  // The same into a buffer that exists: what a device implements for pack.
  m.def(
      "pack_into("
      "Tensor(a!) buffer, "
      "Tensor x, "
      "SymInt[] starts, "
      "SymInt[] sizes"
      ") -> ()");

  // A buffer back into the boxes of a tensor, written or added: what a device implements for unpack.
  m.def(
      "unpack_("
      "Tensor(a!) out, "
      "Tensor buffer, "
      "SymInt[] starts, "
      "SymInt[] sizes, "
      "bool accumulate=False"
      ") -> ()");

  // The adjoint of pack: zeros with the buffer's pieces added.
  m.def(
      "unpack("
      "Tensor buffer, "
      "SymInt[] shape, "
      "SymInt[] starts, "
      "SymInt[] sizes, "
      "ScalarType? dtype=None"
      ") -> Tensor");

  // The gradient rescale of a module in one pass.
  m.def(
      "rescale_("
      "Tensor(a!)[] buffers, "
      "Tensor factor, "
      "bool with_sumsq=False, "
      "bool with_found_inf=False"
      ") -> (Tensor sumsq, Tensor found_inf)");
}

// The functional forms are made of the kernels of whichever device the tensors are on.
TORCH_LIBRARY_IMPL(mimo_ext, CompositeExplicitAutograd, m) {
  m.impl("pack", ops::pack);
  m.impl("unpack", ops::unpack);
}

TORCH_LIBRARY_IMPL(mimo_ext, Autograd, m) {
  m.impl("pack_into", pack_into_autograd);
  m.impl("unpack_", unpack_autograd);
  m.impl("rescale_", rescale_autograd);
}

TORCH_LIBRARY_IMPL(mimo_ext, ADInplaceOrView, m) {
  m.impl("pack_into", pack_into_versioned);
  m.impl("unpack_", unpack_versioned);
  m.impl("rescale_", rescale_versioned);
}

}  // namespace mimo_ext
