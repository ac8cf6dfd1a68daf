// Layouts, plans and stage counting.
#include <pybind11/stl.h>

#include <cmath>

#include "bindings/bindings.h"
#include "comm/header.h"
#include "core/layout.h"
#include "core/limits.h"
#include "core/plan.h"
#include "core/row_shards.h"
#include "core/stages.h"

namespace mimo_ext::bindings {

namespace py = pybind11;
using core::Boundary;
using core::Box;
using core::Direction;
using core::Layout;
using core::Message;
using core::Microbatch;
using core::Plan;
using core::RankPlan;

namespace {

/// Box -> ((start, size), ...) over the tensor's axes.
py::tuple box_tuple(const Box& box, int ndim) {
  py::tuple axes(static_cast<std::size_t>(ndim));
  for (std::size_t axis = 0; axis < static_cast<std::size_t>(ndim); ++axis) {
    axes[axis] = py::make_tuple(box.start[axis], box.size[axis]);
  }
  return axes;
}

py::list messages(const Plan& plan, const std::vector<Message>& list, bool lane_copy) {
  py::list out;
  const int ndim = plan.microbatch().ndim;
  for (const Message& m : list) {
    py::dict message;
    message["sender"] = m.sender;
    message["receiver"] = m.receiver;
    message["sender_lane"] = m.sender_lane;
    message["receiver_lane"] = m.receiver_lane;
    message["contribution"] = m.contribution;
    message["chunk"] = m.chunk;
    message["send_box"] = box_tuple(m.send_box, ndim);
    message["recv_box"] = box_tuple(m.recv_box, ndim);
    message["lane_copy"] = lane_copy;
    out.append(message);
  }
  return out;
}

py::dict rank_plan(const Plan& plan, int rank, bool as_sender, bool as_receiver) {
  const RankPlan mine = plan.for_rank(rank, as_sender, as_receiver);
  py::dict out;
  out["sends"] = messages(plan, mine.sends, false);
  out["receives"] = messages(plan, mine.receives, false);
  out["lane_sends"] = messages(plan, mine.lane_sends, true);
  out["lane_receives"] = messages(plan, mine.lane_receives, true);
  return out;
}

py::tuple shape_tuple(const std::array<std::int64_t, core::kMaxDims>& shape, int ndim) {
  py::tuple out(static_cast<std::size_t>(ndim));
  for (std::size_t axis = 0; axis < static_cast<std::size_t>(ndim); ++axis) out[axis] = shape[axis];
  return out;
}

/// What is no number, or far out of range, becomes a value that Links::check() refuses.
std::int64_t rounded(double value) {
  constexpr auto kMost = static_cast<double>(core::kMaxLinkValue);
  return std::abs(value) <= kMost ? std::llround(value) : value > 0 ? core::kMaxLinkValue + 1 : -1;
}

std::int64_t nanos(double seconds) {
  return rounded(seconds * 1e9);
}

core::PlanOptions plan_options(int max_chunks, std::int64_t min_chunk_bytes, const std::string& path,
                               const std::optional<core::Links>& links) {
  return {{max_chunks, min_chunk_bytes}, core::parse_path(path), links};
}

void register_links(py::module_& m) {
  py::class_<core::Links>(m, "Links",
                          "What a plan takes the links of every rank to be, in bytes per second and seconds.")
      .def(py::init([](double nic, double host, double latency, double overhead, int ranks_per_host) {
             core::Links links{rounded(nic), rounded(host), nanos(latency), nanos(overhead), ranks_per_host};
             links.check();
             return links;
           }),
           py::kw_only(), py::arg("nic"), py::arg("host"), py::arg("latency"), py::arg("overhead"),
           py::arg("ranks_per_host") = 0)
      .def("__eq__", [](const core::Links& a, const core::Links& b) { return a == b; });
}

void register_plan(py::module_& m) {
  py::class_<Microbatch>(m, "Microbatch", "The global microbatch that a plan is for.")
      .def(py::init([](int ndim, int batch_dim, int seq_dim, std::int64_t samples, std::vector<std::int64_t> shape,
                       std::int64_t rows_per_sample, std::vector<std::int64_t> rows, int element_size,
                       std::shared_ptr<core::RowShards> row_shards) {
             if (ndim < 2 || ndim > core::kMaxDims || static_cast<int>(shape.size()) != ndim) {
               throw std::invalid_argument("microbatch: expected a shape of 2 or 3 axes, got " +
                                           std::to_string(shape.size()));
             }
             Microbatch microbatch{ndim,
                                   batch_dim,
                                   seq_dim,
                                   samples,
                                   {1, 1, 1},
                                   rows_per_sample,
                                   std::move(rows),
                                   element_size,
                                   std::move(row_shards)};
             std::copy(shape.begin(), shape.end(), microbatch.shape.begin());
             if (batch_dim >= 0 && batch_dim < ndim) microbatch.shape[static_cast<std::size_t>(batch_dim)] = 1;
             return microbatch;
           }),
           py::kw_only(), py::arg("ndim"), py::arg("batch_dim"), py::arg("seq_dim"), py::arg("samples"),
           py::arg("shape"), py::arg("rows_per_sample") = 1, py::arg("rows") = std::vector<std::int64_t>{},
           py::arg("element_size") = 1, py::arg("row_shards") = std::shared_ptr<core::RowShards>())
      .def_readonly("ndim", &Microbatch::ndim)
      .def_readonly("batch_dim", &Microbatch::batch_dim)
      .def_readonly("seq_dim", &Microbatch::seq_dim)
      .def_readonly("samples", &Microbatch::samples)
      .def_property_readonly("shape",
                             [](const Microbatch& microbatch) {
                               return std::vector<std::int64_t>(microbatch.shape.begin(),
                                                                microbatch.shape.begin() + microbatch.ndim);
                             })
      .def_readonly("rows", &Microbatch::rows)
      .def_readonly("rows_per_sample", &Microbatch::rows_per_sample)
      .def_property_readonly(
          "row_shards",
          [](const Microbatch& microbatch) {
            return std::const_pointer_cast<core::RowShards>(microbatch.row_shards);  // immutable: no method changes it
          })
      .def("check", &Microbatch::check, "ValueError where its numbers do not fit together, or are too large.")
      .def("__eq__", [](const Microbatch& a, const Microbatch& b) { return a == b; })
      .def("__hash__", [](const Microbatch& microbatch) { return static_cast<py::ssize_t>(microbatch.hash() >> 1); });

  py::class_<Plan>(m, "Plan",
                   "Who sends which box of the boundary tensor to whom, for one microbatch in one direction.")
      .def(py::init([](const Boundary& source, const Boundary& destination, const Microbatch& microbatch, bool backward,
                       int max_chunks, std::int64_t min_chunk_bytes, const std::string& path,
                       const std::optional<core::Links>& links) {
             return Plan(source, destination, microbatch, backward ? Direction::kBackward : Direction::kForward,
                         plan_options(max_chunks, min_chunk_bytes, path, links));
           }),
           py::arg("source"), py::arg("destination"), py::arg("microbatch"), py::arg("backward") = false,
           py::arg("max_chunks") = core::Chunking{}.max_chunks, py::arg("min_chunk_bytes") = core::Chunking{}.min_bytes,
           py::arg("path") = "auto", py::arg("links") = py::none())
      .def(
          "of",
          [](const Plan& plan, const Microbatch& microbatch) {
            return Plan(plan.sides(), microbatch, plan.direction(), plan.options());
          },
          py::arg("microbatch"), "The plan of another microbatch; what depends on the ranks alone is shared with it.")
      .def("reversed", &Plan::reversed, "The same microbatch in the other direction. An involution.")
      .def_property_readonly("source", &Plan::source)
      .def_property_readonly("destination", &Plan::destination)
      .def_property_readonly("microbatch", &Plan::microbatch)
      .def_property_readonly("backward", [](const Plan& plan) { return plan.direction() == Direction::kBackward; })
      .def_property_readonly("path", [](const Plan& plan) { return core::to_string(plan.options().path); })
      .def_property_readonly(
          "paths_taken",
          [](const Plan& plan) {
            py::list taken;
            for (const core::Path path : plan.paths().taken) taken.append(core::to_string(path));
            return taken;
          },
          "Paths that overlaps of lanes take, as far as their row counts are known here.")
      .def_property_readonly(
          "path_times",
          [](const Plan& plan) {
            py::dict times;
            const auto paths = plan.paths();
            for (const core::Path path : core::kPaths) {
              times[core::to_string(path)] = static_cast<double>(paths.times.of(path)) * 1e-9;
            }
            return times;
          },
          "Modelled seconds by path, were all overlaps of lanes like the largest.")
      .def("for_rank", &rank_plan, py::arg("rank"), py::arg("as_sender") = true, py::arg("as_receiver") = true,
           "Messages of one rank: dict of lists 'sends', 'receives', 'lane_sends', 'lane_receives'. A message is a "
           "dict with "
           "sender, receiver (global ranks), sender_lane, receiver_lane, contribution (0 writes, more adds), chunk, "
           "send_box "
           "and recv_box "
           "(((start, size), ...) per axis, in the tensor that the rank holds) and lane_copy.")
      .def(
          "sender_shape",
          [](const Plan& plan, int lane, int member) {
            return shape_tuple(plan.sender_shape(lane, member), plan.microbatch().ndim);
          },
          py::arg("lane"), py::arg("member") = 0)
      .def(
          "receiver_shape",
          [](const Plan& plan, int lane, int member) {
            return shape_tuple(plan.receiver_shape(lane, member), plan.microbatch().ndim);
          },
          py::arg("lane"), py::arg("member") = 0)
      .def("to_string", &Plan::to_string, py::arg("max_lines") = 64, "A table, one line per message.")
      .def("__str__", [](const Plan& plan) { return plan.to_string(64); })
      .def("__hash__", [](const Plan& plan) { return static_cast<py::ssize_t>(plan.hash() >> 1); })
      .def_property_readonly("digest", &Plan::hash, "64-bit hash that is the same on every machine.")
      .def("__eq__", [](const Plan& a, const Plan& b) { return a == b; });
}

}  // namespace

void register_core(py::module_& m) {
  py::class_<Boundary>(m, "Boundary", "The ranks of one pipeline stage of a module as lanes of tp * cp ranks.")
      .def_readonly("module", &Boundary::module)
      .def_readonly("tp", &Boundary::tp)
      .def_readonly("cp", &Boundary::cp)
      .def_readonly("lanes", &Boundary::lanes)
      .def_readonly("sequence_parallel", &Boundary::sequence_parallel)
      .def_property_readonly("cp_placement", [](const Boundary& b) { return core::to_string(b.cp_placement); })
      .def("find", &Boundary::find, py::arg("rank"), "(lane, member) of a global rank; (-1, -1) where it is not here.")
      .def(
          "shard_of",
          [](const Boundary& b, int member) {
            if (member < 0 || member >= b.lane_size()) {
              throw py::index_error("layout of module '" + b.module + "': expected a member below " +
                                    std::to_string(b.lane_size()) + ", got " + std::to_string(member));
            }
            return b.shard_of(member);
          },
          py::arg("member"))
      .def(
          "runs_of_shard",
          [](const Boundary& b, int shard, std::int64_t extent) {
            py::list runs;
            for (const core::Run& run : b.runs_of_shard(shard, extent)) {
              runs.append(py::make_tuple(run.start, run.length, run.local_start));
            }
            return runs;
          },
          py::arg("shard"), py::arg("extent"), "[(start, length, local_start), ...] along the sequence axis.")
      .def("__str__", [](const Boundary& b) { return core::describe(b); })
      .def("__eq__", [](const Boundary& a, const Boundary& b) { return a == b; });

  py::class_<Layout>(m, "Layout", "A module's ranks factorised by named dims, the first dim varying fastest.")
      .def(py::init([](std::vector<int> ranks, std::vector<std::pair<std::string, int>> dims,
                       const std::string& cp_placement, bool sequence_parallel, std::string name) {
             return Layout(std::move(ranks), std::move(dims), core::parse_cp_placement(cp_placement), sequence_parallel,
                           std::move(name));
           }),
           py::arg("ranks"), py::arg("dims"), py::arg("cp_placement"), py::arg("sequence_parallel"), py::arg("name"))
      .def("boundary", &Layout::boundary, py::arg("stage"));

  register_links(m);
  register_plan(m);

  m.attr("WIRE_VERSION") = comm::Header::kVersion;
  m.attr("MAX_CHUNKS") = core::kMaxChunks;
  m.def("hash_of", &core::hash_of, py::arg("source"), py::arg("destination"));
  m.def(
      "longest_path",
      [](const std::vector<std::int64_t>& weights, const std::vector<std::vector<int>>& downstream,
         const std::vector<std::string>& names,
         int target) { return core::longest_path(weights, downstream, names, target); },
      py::arg("weights"), py::arg("downstream"), py::arg("names"), py::arg("target") = -1,
      "Largest sum of weights along a path of a DAG, ending at `target` where it is >= 0.");
}

}  // namespace mimo_ext::bindings
