// Plans in words: for logs, errors and `print(bridge.plan)`.
#include <algorithm>
#include <cstdio>
#include <sstream>
#include <stdexcept>

#include "core/plan.h"

namespace mimo_ext::core {

namespace {

std::string text_of(const Box& box, int ndim) {
  std::string text = "[";
  for (int axis = 0; axis < ndim; ++axis) {
    const auto index = static_cast<std::size_t>(axis);
    if (axis > 0) text += ", ";
    if (box.start[index] == kUnknownRows) {
      text += "? +" + std::to_string(box.size[index]);
    } else {
      text += std::to_string(box.start[index]) + ":" + std::to_string(box.start[index] + box.size[index]);
    }
  }
  return text + "]";
}

std::string bytes_text(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  for (; bytes >= 1024.0 && unit < 4; ++unit) bytes /= 1024.0;
  char text[32];
  std::snprintf(text, sizeof(text), unit == 0 ? "%.0f %s" : "%.1f %s", bytes, units[unit]);
  return text;
}

std::string time_text(std::int64_t nanos) {
  char text[32];
  const double seconds = static_cast<double>(nanos) * 1e-9;
  const double scale = seconds < 1e-3 ? 1e6 : seconds < 1.0 ? 1e3 : 1.0;
  std::snprintf(text, sizeof(text), "%.1f %s", seconds * scale, scale == 1e6 ? "us" : scale == 1e3 ? "ms" : "s");
  return text;
}

/// "pipelined (auto): modelled pipelined 1.2 ms, leader 3.4 ms, direct 2.0 ms".
std::string path_text(const Plan& plan) {
  const Plan::Paths paths = plan.paths();
  if (paths.taken.empty()) return "none: nothing moves";
  std::string text;
  for (const Path path : paths.taken) text += (text.empty() ? "" : " or ") + std::string(to_string(path));
  text += plan.options().path == Path::kAuto ? " (auto)" : " (given)";
  std::string times;
  for (const Path path : kPaths) {
    times += (times.empty() ? "" : ", ") + std::string(to_string(path)) + " " + time_text(paths.times.of(path));
  }
  return text + "; modelled: " + times + " (overlaps of " + bytes_text(static_cast<double>(paths.bytes)) + ")";
}

}  // namespace

std::string describe(const Boundary& boundary) {
  constexpr int kShown = 4;
  constexpr std::size_t kRanksShown = 8;
  std::ostringstream out;
  out << "tp=" << boundary.tp << " cp=" << boundary.cp;
  if (boundary.cp > 1) out << " (" << to_string(boundary.cp_placement) << ")";
  if (boundary.sequence_parallel) out << " sequence parallel";
  out << ", " << boundary.num_lanes() << (boundary.num_lanes() == 1 ? " lane:" : " lanes:");
  for (int lane = 0; lane < boundary.num_lanes(); ++lane) {
    if (lane == kShown && boundary.num_lanes() > kShown + 1) {
      out << " ... " << boundary.num_lanes() - kShown - 1 << " more ...";
      lane = boundary.num_lanes() - 1;
    }
    out << " [";
    const auto& ranks = boundary.lanes[static_cast<std::size_t>(lane)];
    for (std::size_t member = 0; member < ranks.size(); ++member) {
      if (member == kRanksShown - 1 && ranks.size() > kRanksShown) {
        out << " ...";
        member = ranks.size() - 1;
      }
      out << (member ? " " : "") << ranks[member];
    }
    out << "]";
  }
  return out.str();
}

std::string Plan::to_string(int max_lines) const {
  const auto name = [](const Boundary& boundary) { return boundary.module.empty() ? "(unnamed)" : boundary.module; };
  std::ostringstream out;
  const bool forward = direction_ == Direction::kForward;
  out << "Plan " << (forward ? "forward" : "backward") << ": " << name(sender()) << " -> " << name(receiver()) << "\n";
  out << "  sender   " << describe(sender()) << "\n  receiver " << describe(receiver()) << "\n";
  out << "  microbatch: " << microbatch_.samples << " samples, ";
  if (microbatch_.ndim == 2) {
    out << "2-D [rows, " << microbatch_.shape[1] << "], ";
    if (microbatch_.ragged()) {
      out << "ragged rows";
    } else {
      out << microbatch_.rows_per_sample << " rows each";
    }
    if (row_shards() != nullptr) out << " dealt to " << row_shards()->num_shards() << " shards of the destination";
  } else {
    out << "3-D [";
    for (int axis = 0; axis < 3; ++axis) {
      out << (axis ? ", " : "")
          << (axis == microbatch_.batch_dim ? std::string("b")
                                            : std::to_string(microbatch_.shape[static_cast<std::size_t>(axis)]));
    }
    out << "]";
  }
  out << ", " << microbatch_.element_size << " bytes per element\n";
  out << "  path: " << path_text(*this) << "\n";

  int shown = 0;
  int left_out = 0;
  const auto line = [&](const char* kind, const Message& message, const Box& from, const Box& to) {
    if (shown >= max_lines) {
      ++left_out;
      return;
    }
    ++shown;
    char head[96];
    const double bytes = static_cast<double>(to.volume()) * microbatch_.element_size;
    std::snprintf(head, sizeof(head), "  %-8s %5d -> %-5d %10s  ", message.sender == message.receiver ? "local" : kind,
                  message.sender, message.receiver, bytes_text(bytes).c_str());
    out << head << text_of(from, microbatch_.ndim) << " -> " << text_of(to, microbatch_.ndim);
    if (message.contribution > 0) out << " (added)";
    out << "\n";
  };
  // Messages are listed by sender, so that each appears once.
  int unknown = 0;
  for (const bool copies : {false, true}) {
    const Boundary& side = copies ? receiver() : sender();
    for (int lane = 0; lane < side.num_lanes() && left_out == 0; ++lane) {
      for (int member = 0; member < side.lane_size(); ++member) {
        constexpr std::pair kNowhere{-1, -1};
        RankPlan mine;
        try {
          mine = copies ? for_places(kNowhere, {lane, member}) : for_places({lane, member}, kNowhere);
        } catch (const std::invalid_argument&) {
          ++unknown;  // a rank knows the row counts of its own samples: the other lanes' messages are theirs to tell
          continue;
        }
        for (const Message& message : copies ? mine.lane_sends : mine.sends) {
          line(copies ? "copy" : "send", message, message.send_box, message.recv_box);
        }
      }
    }
  }
  if (left_out > 0) out << "  ... more messages are not shown\n";
  if (unknown > 0) out << "  ... messages that depend on row counts of other lanes are not known here\n";
  return out.str();
}

}  // namespace mimo_ext::core
