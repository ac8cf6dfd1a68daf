// RowShards, and its construction from a mask of positions.
#include <ATen/ATen.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <utility>

#include "bindings/bindings.h"
#include "core/limits.h"
#include "core/row_shards.h"

namespace mimo_ext::bindings {

namespace py = pybind11;
using core::Boundary;
using core::RowShards;
using core::Segment;

namespace {

/// Positions [start, start + length) of a sequence and the shard that has them.
struct Interval {
  int shard = 0;
  std::int64_t start = 0;
  std::int64_t length = 0;
};

/// A sequence of `length` positions cut as `boundary` places them; ascending.
std::vector<Interval> intervals_of(const Boundary& boundary, std::int64_t length) {
  std::vector<Interval> intervals;
  for (int shard = 0; shard < boundary.num_shards(); ++shard) {
    for (const core::Run& run : boundary.runs_of_shard(shard, length)) {
      intervals.push_back({shard, run.start, run.length});
    }
  }
  std::sort(intervals.begin(), intervals.end(), [](const Interval& a, const Interval& b) { return a.start < b.start; });
  return intervals;
}

/// Of `count` samples from `first` on; a first one that is out of range is refused by RowShards.
std::int64_t end_of(std::int64_t first, std::int64_t count) {
  return first < 0 || first > core::kMaxRowCounts ? count : first + count;
}

std::shared_ptr<RowShards> from_mask(const at::Tensor& mask, int tp, int cp, bool sequence_parallel,
                                     const std::string& cp_placement, std::int64_t first_sample,
                                     std::optional<std::int64_t> num_samples) {
  const auto bad = [](const std::string& what) { throw std::invalid_argument("RowShards.from_mask: " + what); };
  if (tp < 1 || cp < 1) {
    bad("expected positive tp and cp, got " + std::to_string(tp) + " and " + std::to_string(cp));
  }
  if (mask.dim() != 2 || mask.scalar_type() != at::kBool || !mask.device().is_cpu()) {
    bad("expected a bool mask [b, s] on the CPU, got " + std::to_string(mask.dim()) + " axes of " +
        c10::toString(mask.scalar_type()) + " on " + mask.device().str());
  }
  const Boundary boundary{"", tp, cp, core::parse_cp_placement(cp_placement), sequence_parallel, {}};
  if (cp > 1 && boundary.cp_placement == core::CpPlacement::kReplicated) {
    bad("cp_placement: expected 'zigzag' or 'contiguous' where cp > 1, got 'replicated'");
  }
  if (std::int64_t{tp} * cp > core::kMaxRanks) {
    bad("expected at most " + std::to_string(core::kMaxRanks) + " ranks, got tp=" + std::to_string(tp) +
        " times cp=" + std::to_string(cp));
  }
  const std::int64_t length = mask.size(1);
  if (length > core::kMaxElements || mask.size(0) > core::kMaxRowCounts) {
    bad("expected at most " + std::to_string(core::kMaxRowCounts) + " samples, got a mask of " +
        std::to_string(mask.size(0)) + " of " + std::to_string(length) + " positions");
  }
  const std::int64_t chunks = boundary.cp_placement == core::CpPlacement::kZigzag && cp > 1 ? 2 * cp : cp;
  const std::int64_t parts = sequence_parallel ? tp : 1;
  if (length % chunks != 0 || length / cp % parts != 0) {
    bad("expected a sequence length that splits into " + std::to_string(chunks) + " chunks and, on each of " +
        std::to_string(cp) + " cp ranks, into " + std::to_string(parts) + " parts, got " + std::to_string(length));
  }
  const std::vector<Interval> intervals = intervals_of(boundary, length);
  const at::Tensor rows = mask.contiguous();
  const auto* data = rows.const_data_ptr<bool>();
  std::vector<std::vector<Segment>> segments(static_cast<std::size_t>(rows.size(0)));
  for (auto& of_sample : segments) {
    for (const Interval& interval : intervals) {
      const bool* first = data + interval.start;
      const std::int64_t count = std::count(first, first + interval.length, true);
      if (count > 0) of_sample.push_back({interval.shard, count});
    }
    data += length;
  }
  return std::make_shared<RowShards>(segments, boundary.num_shards(),
                                     num_samples.value_or(end_of(first_sample, rows.size(0))), first_sample);
}

/// The range of samples that was asked for; all known ones by default.
std::pair<std::int64_t, std::int64_t> range(const RowShards& shards, std::optional<std::int64_t> first,
                                            std::optional<std::int64_t> last) {
  const std::pair asked(first.value_or(shards.first_known()), last.value_or(shards.last_known()));
  if (asked.first < 0 || asked.second > shards.num_samples()) {
    throw std::invalid_argument("row shards: expected samples of [0, " + std::to_string(shards.num_samples()) +
                                "), got [" + std::to_string(asked.first) + ", " + std::to_string(asked.second) + ")");
  }
  return asked;
}

}  // namespace

void register_row_shards(py::module_& m) {
  py::class_<RowShards, std::shared_ptr<RowShards>>(m, "RowShards",
                                                    R"(How the rows of a 2-D tensor are dealt to the ranks of a lane.

A consumer that splits its sequence over ranks (sequence or context parallelism) uses on each of them only the rows at
that rank's positions. With `row_shards=` a bridge carries those rows only, and their gradients back. Both sides give
the row shards of the samples that they have; `from_mask` computes them from the positions of the rows.

Shard m belongs to member m of a destination lane (tp varies fastest) where there are tp * cp of them; where there are
cp, shard c belongs to all tp ranks of cp coordinate c. A rank holds its rows ordered by sample, then by row.

Args:
    segments: for each sample from `first_sample` on the shards of its rows as [(shard, rows), ...], in row order.
    num_shards: tp * cp of the destination, or its cp where its tp ranks are replicas.
    num_samples: of the global microbatch; default: those up to the last that is given.
    first_sample: position of the first given sample in the global microbatch.

Raises:
    ValueError: shards, rows or samples out of range.

>>> RowShards([[(0, 3), (1, 1)], [(1, 2)]], num_shards=2).row_counts()
[4, 2]
)")
      .def(py::init([](const std::vector<std::vector<std::pair<int, std::int64_t>>>& segments, int num_shards,
                       std::optional<std::int64_t> num_samples, std::int64_t first_sample) {
             std::vector<std::vector<Segment>> of_samples(segments.size());
             for (std::size_t sample = 0; sample < segments.size(); ++sample) {
               for (const auto& [shard, rows] : segments[sample]) of_samples[sample].push_back({shard, rows});
             }
             const auto end = end_of(first_sample, static_cast<std::int64_t>(segments.size()));
             return std::make_shared<RowShards>(of_samples, num_shards, num_samples.value_or(end), first_sample);
           }),
           py::arg("segments"), py::arg("num_shards"), py::arg("num_samples") = std::nullopt,
           py::arg("first_sample") = 0)
      .def_static("from_mask", &from_mask, py::arg("mask"), py::kw_only(), py::arg("tp") = 1, py::arg("cp") = 1,
                  py::arg("sequence_parallel") = false, py::arg("cp_placement") = "zigzag", py::arg("first_sample") = 0,
                  py::arg("num_samples") = std::nullopt,
                  R"(The row shards of rows that fill the positions of a mask, in ascending order in each sample.

Args:
    mask: bool [b, s] on the CPU, True where a row goes; b consecutive samples of the global microbatch.
    tp, cp: sizes of the destination.
    sequence_parallel: its tp ranks hold contiguous parts of what their cp rank holds; else they are replicas.
    cp_placement: "zigzag" (of 2 * cp chunks, cp rank c holds chunks c and 2 * cp - 1 - c) or "contiguous".
    first_sample, num_samples: as in the constructor.

Raises:
    ValueError: another kind of mask, or a sequence that does not split into equal parts.
)")
      .def_property_readonly("num_shards", &RowShards::num_shards)
      .def_property_readonly("num_samples", &RowShards::num_samples, "Of the global microbatch.")
      .def_property_readonly(
          "samples", [](const RowShards& shards) { return std::pair(shards.first_known(), shards.last_known()); },
          "(first, last): samples [first, last) of the global microbatch are described here.")
      .def(
          "row_counts",
          [](const RowShards& shards, std::optional<std::int64_t> first, std::optional<std::int64_t> last) {
            const auto [begin, end] = range(shards, first, last);
            std::vector<std::int64_t> counts;
            for (std::int64_t sample = begin; sample < end; ++sample) counts.push_back(shards.rows(sample));
            return counts;
          },
          py::arg("first") = std::nullopt, py::arg("last") = std::nullopt,
          "Rows of each of samples [first, last), by default of all that are described here; -1 where they are not.")
      .def(
          "rows_of_shard",
          [](const RowShards& shards, int shard, std::optional<std::int64_t> first, std::optional<std::int64_t> last) {
            const auto [begin, end] = range(shards, first, last);
            return shards.rows_of_shard(shard, begin, end);
          },
          py::arg("shard"), py::arg("first") = std::nullopt, py::arg("last") = std::nullopt,
          "Rows of a shard in samples [first, last), by default in all that are described here.")
      .def(
          "segments",
          [](const RowShards& shards, std::int64_t sample) {
            std::vector<std::pair<int, std::int64_t>> line;
            const auto [first, last] = range(shards, sample, sample < shards.num_samples() ? sample + 1 : sample);
            for (const Segment& s : shards.segments(first, last)) line.emplace_back(s.shard, s.rows);
            return line;
          },
          py::arg("sample"), "[(shard, rows), ...] of a sample, in row order; no empty ones, and no two of one shard.")
      .def(
          "hash",
          [](const RowShards& shards, std::optional<std::int64_t> first, std::optional<std::int64_t> last) {
            const auto [begin, end] = range(shards, first, last);
            return shards.hash(begin, end);
          },
          py::arg("first") = std::nullopt, py::arg("last") = std::nullopt,
          "64-bit hash over samples [first, last), the same on every machine and wherever else samples are known.")
      .def("__eq__", [](const RowShards& a, const RowShards& b) { return a == b; })
      .def("__eq__", [](const RowShards&, const py::object&) { return false; })
      .def("__hash__",
           [](const RowShards& shards) {
             return static_cast<py::ssize_t>(shards.hash(shards.first_known(), shards.last_known()) >> 1);
           })
      .def("__repr__", [](const RowShards& shards) {
        return "RowShards(samples [" + std::to_string(shards.first_known()) + ", " +
               std::to_string(shards.last_known()) + ") of " + std::to_string(shards.num_samples()) + ", " +
               std::to_string(shards.num_shards()) + " shards)";
      });
}

}  // namespace mimo_ext::bindings
