// The communicator. Everything that may block releases the GIL.
#include <pybind11/chrono.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings/bindings.h"
#include "comm/c10d_transport.h"
#include "comm/communicator.h"
#include "comm/leftovers.h"

namespace mimo_ext::bindings {

namespace py = pybind11;
using comm::BridgeConfig;
using comm::Communicator;
using comm::Delivery;
using Release = py::call_guard<py::gil_scoped_release>;

namespace {

void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::shared_ptr<Communicator> make_communicator(
    std::string name, const core::Boundary& source, const core::Boundary& destination, int ndim, int batch_dim,
    int seq_dim, const py::object& dtype, std::optional<core::Microbatch> fixed, std::chrono::milliseconds timeout,
    int max_in_flight, std::uint64_t hash, int rank, c10::intrusive_ptr<c10d::ProcessGroup> group,
    const std::vector<int>& group_ranks, bool unpaired_backward, int max_chunks, std::int64_t min_chunk_bytes,
    c10::intrusive_ptr<c10d::ProcessGroup> backward_group, int tag_offset, const std::string& path,
    const std::optional<core::Links>& links) {
  if (!THPDtype_Check(dtype.ptr())) throw py::type_error("dtype: expected a torch.dtype");
  BridgeConfig config{std::move(name),
                      std::make_shared<const core::Sides>(source, destination),
                      ndim,
                      batch_dim,
                      seq_dim,
                      reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type,
                      std::move(fixed),
                      timeout,
                      max_in_flight,
                      {{max_chunks, min_chunk_bytes}, core::parse_path(path), links},
                      unpaired_backward,
                      tag_offset,
                      hash};
  const auto transport = [&group_ranks](c10::intrusive_ptr<c10d::ProcessGroup> over) {
    return over ? std::make_unique<comm::C10dTransport>(std::move(over), group_ranks) : nullptr;
  };
  auto forward = transport(std::move(group));
  auto backward = transport(std::move(backward_group));
  auto communicator = std::make_shared<Communicator>(std::move(config), std::move(forward), std::move(backward), rank);
  communicator->set_interrupt_check(check_signals);
  return communicator;
}

/// An undefined tensor is None in Python.
std::optional<at::Tensor> optional_tensor(at::Tensor tensor) {
  if (!tensor.defined()) return std::nullopt;
  return tensor;
}

py::dict counters_of(Communicator& communicator, bool forward) {
  const comm::Counters* counters = &communicator.counters(forward);
  constexpr double kSecond = 1e9;
  py::dict found;
  found["sends"] = counters->sends.load();
  found["receives"] = counters->receives.load();
  found["bytes_sent"] = counters->bytes_sent.load();
  found["bytes_received"] = counters->bytes_received.load();
  found["transfer_s"] = static_cast<double>(counters->transfer_ns.load()) / kSecond;
  found["exposed_s"] = static_cast<double>(counters->exposed_ns.load()) / kSecond;
  return found;
}

py::list events_of(Communicator& communicator) {
  py::list events;
  for (const comm::Event& event : communicator.trace().events()) {
    const std::string side = event.is_send ? "send" : "recv";
    py::dict entry;
    entry["operation"] = side + (event.is_forward ? "_forward" : "_backward");
    entry["microbatch"] = event.microbatch;
    entry["bytes"] = event.bytes;
    entry["posted_ns"] = event.times.posted;
    entry["started_ns"] = event.times.started;
    entry["done_ns"] = event.times.ended;
    entry["wait_begin_ns"] = event.wait_began;
    entry["wait_end_ns"] = event.wait_ended;
    events.append(entry);
  }
  return events;
}

}  // namespace

void register_comm(py::module_& m) {
  // Messages of these name the bridge, this rank, the operation, the microbatch and the peer.
  const auto& error = py::register_exception<comm::BridgeError>(m, "BridgeError", PyExc_RuntimeError);
  py::register_exception<comm::BridgeTimeoutError>(m, "BridgeTimeoutError", error);

  py::class_<Delivery, std::shared_ptr<Delivery>>(m, "Delivery", "An operation of a communicator that is under way.")
      .def("done", &Delivery::done)
      .def_property_readonly("expects_backward", &Delivery::expects_backward);

  py::class_<Communicator, std::shared_ptr<Communicator>>(m, "Communicator",
                                                          "Both directions of one bridge on one rank.")
      .def(py::init(&make_communicator), py::kw_only(), py::arg("name"), py::arg("source"), py::arg("destination"),
           py::arg("ndim"), py::arg("batch_dim"), py::arg("seq_dim"), py::arg("dtype"), py::arg("fixed"),
           py::arg("timeout"), py::arg("max_in_flight"), py::arg("hash"), py::arg("rank"), py::arg("group"),
           py::arg("group_ranks"), py::arg("unpaired_backward") = false,
           py::arg("max_chunks") = core::Chunking{}.max_chunks, py::arg("min_chunk_bytes") = core::Chunking{}.min_bytes,
           py::arg("backward_group") = nullptr, py::arg("tag_offset") = 0, py::arg("path") = "auto",
           py::arg("links") = py::none())
      .def_property_readonly("is_source", &Communicator::is_source)
      .def_property_readonly("is_destination", &Communicator::is_destination)
      .def_property_readonly("closed", &Communicator::closed)
      .def_property_readonly("outstanding", &Communicator::outstanding)
      .def("last_plan", &Communicator::last_plan)
      .def(
          "send_forward",
          [](Communicator& c, const at::Tensor& x, const std::optional<std::vector<std::int64_t>>& row_counts,
             std::optional<std::int64_t> num_samples, std::shared_ptr<core::RowShards> row_shards, bool want_delivery) {
            return c.send_forward(x, row_counts, num_samples, std::move(row_shards), want_delivery);
          },
          Release(), py::arg("x"), py::arg("row_counts") = py::none(), py::arg("num_samples") = py::none(),
          py::arg("row_shards") = nullptr, py::arg("want_delivery") = false)
      .def(
          "send_backward",
          [](Communicator& c, const std::optional<at::Tensor>& gradient, bool want_delivery) {
            return c.send_backward(gradient.value_or(at::Tensor()), want_delivery);
          },
          Release(), py::arg("gradient").none(true), py::arg("want_delivery") = false)
      .def(
          "irecv_forward",
          [](Communicator& c, std::shared_ptr<core::RowShards> row_shards, bool waits_soon) {
            return c.irecv_forward(std::move(row_shards), waits_soon);
          },
          Release(), py::arg("row_shards") = nullptr, py::arg("waits_soon") = false)
      .def("irecv_backward", &Communicator::irecv_backward, Release(), py::arg("waits_soon") = false)
      .def(
          "recv_forward",
          [](Communicator& c, std::shared_ptr<core::RowShards> row_shards) {
            return optional_tensor(c.recv_forward(std::move(row_shards)));
          },
          Release(), py::arg("row_shards") = nullptr)
      .def(
          "recv_backward", [](Communicator& c) { return optional_tensor(c.recv_backward()); }, Release())
      .def(
          "wait", [](Communicator& c, Delivery& delivery) { return optional_tensor(c.wait(delivery)); }, Release(),
          py::arg("delivery"))
      .def("counters", &counters_of, py::arg("forward"))
      .def(
          "start_trace", [](Communicator& c, std::size_t capacity) { c.trace().start(capacity); }, py::arg("capacity"))
      .def("trace_events", &events_of)
      .def("close", &Communicator::close, Release(), py::arg("abort") = false)
      .def("leave", &Communicator::leave, Release());

  m.def(
      "finish_leftovers", [](bool abort) { comm::Leftovers::instance().finish(abort, check_signals); }, Release(),
      py::arg("abort"));
}

}  // namespace mimo_ext::bindings
