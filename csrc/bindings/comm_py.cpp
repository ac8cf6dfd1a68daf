// The communicator. Everything that may block releases the GIL.
#include <pybind11/chrono.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/utils/pybind.h>

#include <array>

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
    const std::optional<core::Links>& links, const std::optional<at::Device>& device, const std::string& carrier,
    std::chrono::microseconds copy_delay, c10::intrusive_ptr<c10d::ProcessGroup> forward_groups,
    c10::intrusive_ptr<c10d::ProcessGroup> backward_groups) {
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
                      hash,
                      device.value_or(at::kCPU),
                      comm::parse_carrier(carrier),
                      copy_delay};
  const auto transport = [&group_ranks](c10::intrusive_ptr<c10d::ProcessGroup> over) {
    return over ? std::make_unique<comm::C10dTransport>(std::move(over), group_ranks) : nullptr;
  };
  auto forward = transport(std::move(group));
  auto backward = transport(std::move(backward_group));
  const auto grouped = [&config](c10::intrusive_ptr<c10d::ProcessGroup> over, int tag) {
    if (!over) return std::unique_ptr<comm::GroupTransport>();
    return std::make_unique<comm::GroupTransport>(std::move(over), config.device.type(), config.tag_offset + tag);
  };
  auto groups = grouped(std::move(forward_groups), comm::kFirstGroupTag);
  auto back_groups = grouped(std::move(backward_groups), comm::kFirstGroupTag + 1);
  auto communicator = std::make_shared<Communicator>(std::move(config), std::move(forward), std::move(backward), rank,
                                                     std::move(groups), std::move(back_groups));
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
  found["bytes_sent"] = counters->bytes_sent.load() + counters->bytes_forwarded.load();
  found["bytes_received"] = counters->bytes_received.load();
  found["transfer_s"] = static_cast<double>(counters->transfer_ns.load()) / kSecond;
  found["exposed_s"] = static_cast<double>(counters->exposed_ns.load()) / kSecond;
  return found;
}

std::string operation_name(bool is_send, bool is_forward) {
  return std::string(is_send ? "send" : "recv") + (is_forward ? "_forward" : "_backward");
}

py::list events_of(Communicator& communicator) {
  py::list events;
  for (const comm::Event& event : communicator.trace().events()) {
    py::dict entry;
    entry["operation"] = operation_name(event.is_send, event.is_forward);
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

/// Of one group: [(sending, peer, bytes)].
py::list messages_of(const std::vector<comm::GroupMessage>& messages) {
  py::list found;
  for (const comm::GroupMessage& message : messages) {
    found.append(py::make_tuple(message.sending, message.peer, message.bytes));
  }
  return found;
}

py::list groups_of(Communicator& communicator) {
  py::list found;
  for (const comm::GroupEntry& entry : communicator.group_log().entries()) {
    found.append(py::make_tuple(entry.is_forward, entry.microbatch, messages_of(entry.messages)));
  }
  return found;
}

/// The flight recorder: {"entries": [...], "caller": what blocks the caller, or None}.
py::dict flight_of(const Communicator& communicator) {
  static constexpr std::array<const char*, 3> kStates{"", "done", "failed"};
  py::list entries;
  for (const comm::FlightEntry& entry : communicator.flight().entries()) {
    const char* waits_for = comm::text_of(entry.phase);
    const bool running = entry.outcome == comm::FlightOutcome::kRunning;
    const bool header = entry.phase == comm::FlightPhase::kHeader || entry.phase == comm::FlightPhase::kRowCounts;
    const char* state = waits_for == nullptr ? "posted" : header ? "header" : entry.is_send ? "sending" : "receiving";
    py::dict found;
    found["id"] = entry.id;
    found["operation"] = operation_name(entry.is_send, entry.is_forward);
    found["microbatch"] = entry.microbatch;
    found["bytes"] = entry.bytes;
    found["state"] = running ? state : kStates[static_cast<std::size_t>(entry.outcome)];
    found["waits_for"] = waits_for == nullptr ? py::object(py::none()) : py::str(waits_for);
    found["peer"] = entry.peer < 0 ? py::object(py::none()) : py::int_(entry.peer);
    found["posted_ns"] = entry.posted;
    found["since_ns"] = entry.since;
    entries.append(found);
  }
  using In = comm::FlightCaller::In;
  const comm::FlightCaller caller = communicator.flight().caller();
  py::object blocked = py::none();
  if (caller.in != In::kNothing) {
    const bool whole = caller.in == In::kClose;
    py::dict found;
    found["operation"] = whole ? "close" : operation_name(caller.in != In::kReceive, caller.is_forward);
    // Where all room is taken no microbatch is waited for in particular.
    const bool one = caller.in == In::kReceive || caller.in == In::kSend;
    found["microbatch"] = one ? py::object(py::int_(caller.microbatch)) : py::none();
    found["since_ns"] = caller.since;
    blocked = found;
  }
  py::dict result;
  result["entries"] = entries;
  result["caller"] = blocked;
  return result;
}

/// Calls `operation`. The error of a failed transfer gets a note of mimo_ext.flight: what this bridge did last.
template <typename Operation>
auto noted(Communicator& communicator, const Operation& operation) {
  const auto raise = [&](const comm::BridgeError& error, const char* type) {
    const py::gil_scoped_acquire gil;
    const py::object raised = py::module_::import("mimo_ext._C").attr(type)(error.what());
    try {
      py::module_::import("mimo_ext.flight").attr("explain")(communicator.shared_from_this(), raised);
    } catch (const py::error_already_set&) {
      // The error itself is what matters.
    }
    PyErr_SetObject(py::type::of(raised).ptr(), raised.ptr());
    throw py::error_already_set();
  };
  try {
    return operation();
  } catch (const comm::BridgeTimeoutError& error) {
    raise(error, "BridgeTimeoutError");
  } catch (const comm::BridgeError& error) {
    // Others are told by what they say: called on the wrong rank, after close().
    if (communicator.closed() || !communicator.failed()) throw;
    raise(error, "BridgeError");
  }
  throw std::logic_error("not reached");
}

}  // namespace

void register_comm(py::module_& m) {
  // Messages of these name the bridge, this rank, the operation, the microbatch and the peer.
  const auto& error = py::register_exception<comm::BridgeError>(m, "BridgeError", PyExc_RuntimeError);
  py::register_exception<comm::BridgeTimeoutError>(m, "BridgeTimeoutError", error);

  py::class_<Delivery, std::shared_ptr<Delivery>>(m, "Delivery", "An operation of a communicator that is under way.")
      .def("done", &Delivery::done)
      .def_property_readonly("expects_backward", &Delivery::expects_backward)
      .def_property_readonly("sequence", &Delivery::sequence)
      .def_property_readonly(
          "microbatch", [](const Delivery& delivery) { return *delivery.microbatch(); },
          "As far as this rank knows it; once a receive has been waited for.");

  py::class_<comm::Remains, std::shared_ptr<comm::Remains>>(
      m, "Remains", "Receives of a communicator that were still posted when it was closed.");

  py::class_<Communicator, std::shared_ptr<Communicator>>(m, "Communicator",
                                                          "Both directions of one bridge on one rank.")
      .def(py::init(&make_communicator), py::kw_only(), py::arg("name"), py::arg("source"), py::arg("destination"),
           py::arg("ndim"), py::arg("batch_dim"), py::arg("seq_dim"), py::arg("dtype"), py::arg("fixed"),
           py::arg("timeout"), py::arg("max_in_flight"), py::arg("hash"), py::arg("rank"), py::arg("group"),
           py::arg("group_ranks"), py::arg("unpaired_backward") = false,
           py::arg("max_chunks") = core::Chunking{}.max_chunks, py::arg("min_chunk_bytes") = core::Chunking{}.min_bytes,
           py::arg("backward_group") = nullptr, py::arg("tag_offset") = 0, py::arg("path") = "auto",
           py::arg("links") = py::none(), py::arg("device") = py::none(), py::arg("carrier") = "direct",
           py::arg("copy_delay") = std::chrono::microseconds(0), py::arg("forward_groups") = nullptr,
           py::arg("backward_groups") = nullptr)
      .def_property_readonly("is_source", &Communicator::is_source)
      .def_property_readonly("is_destination", &Communicator::is_destination)
      .def_property_readonly("closed", &Communicator::closed)
      .def_property_readonly("remains", &Communicator::remains)
      .def_property(
          "max_in_flight", [](const Communicator& communicator) { return communicator.config().max_in_flight; },
          &Communicator::set_max_in_flight)
      .def_property_readonly("outstanding", &Communicator::outstanding)
      .def_property_readonly("host_buffers", &Communicator::host_buffers)
      .def("last_plan", &Communicator::last_plan)
      .def(
          "send_forward",
          [](Communicator& c, const at::Tensor& x, const std::optional<std::vector<std::int64_t>>& row_counts,
             std::optional<std::int64_t> num_samples, std::shared_ptr<core::RowShards> row_shards, bool want_delivery) {
            return noted(
                c, [&] { return c.send_forward(x, row_counts, num_samples, std::move(row_shards), want_delivery); });
          },
          Release(), py::arg("x"), py::arg("row_counts") = py::none(), py::arg("num_samples") = py::none(),
          py::arg("row_shards") = nullptr, py::arg("want_delivery") = false)
      .def(
          "send_backward",
          [](Communicator& c, const std::optional<at::Tensor>& gradient, bool want_delivery) {
            return noted(c, [&] { return c.send_backward(gradient.value_or(at::Tensor()), want_delivery); });
          },
          Release(), py::arg("gradient").none(true), py::arg("want_delivery") = false)
      .def(
          "irecv_forward",
          [](Communicator& c, std::shared_ptr<core::RowShards> row_shards, bool waits_soon) {
            return noted(c, [&] { return c.irecv_forward(std::move(row_shards), waits_soon); });
          },
          Release(), py::arg("row_shards") = nullptr, py::arg("waits_soon") = false)
      .def(
          "irecv_backward",
          [](Communicator& c, bool waits_soon) { return noted(c, [&] { return c.irecv_backward(waits_soon); }); },
          Release(), py::arg("waits_soon") = false)
      .def(
          "recv_forward",
          [](Communicator& c, std::shared_ptr<core::RowShards> row_shards) {
            return optional_tensor(noted(c, [&] { return c.recv_forward(std::move(row_shards)); }));
          },
          Release(), py::arg("row_shards") = nullptr)
      .def(
          "recv_backward", [](Communicator& c) { return optional_tensor(noted(c, [&] { return c.recv_backward(); })); },
          Release())
      .def(
          "wait",
          [](Communicator& c, Delivery& delivery) {
            return optional_tensor(noted(c, [&] { return c.wait(delivery); }));
          },
          Release(), py::arg("delivery"))
      .def("counters", &counters_of, py::arg("forward"))
      .def(
          "start_trace", [](Communicator& c, std::size_t capacity) { c.trace().start(capacity); }, py::arg("capacity"))
      .def("trace_events", &events_of)
      .def("start_group_log", [](Communicator& c) { c.group_log().start(); })
      .def("group_log", &groups_of)
      .def("flight", &flight_of)
      .def("close", &Communicator::close, Release(), py::arg("abort") = false, py::arg("reason") = "")
      .def("leave", &Communicator::leave, Release());

  m.def(
      "group_order",
      [](const core::Plan& plan, int rank) {
        py::list found;
        for (const auto& group : comm::group_order(plan, rank)) found.append(messages_of(group));
        return found;
      },
      py::arg("plan"), py::arg("rank"));
  m.def(
      "finish_leftovers", [](bool abort) { comm::Leftovers::instance().finish(abort, check_signals); }, Release(),
      py::arg("abort"));
}

}  // namespace mimo_ext::bindings
