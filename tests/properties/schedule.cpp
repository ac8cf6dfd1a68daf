#include "schedule.h"

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <stdexcept>

#include "core/hash.h"
#include "fields.h"
#include "orders.h"
#include "simulator.h"

namespace mimo_ext::properties {

namespace {

const auto kFields = [](auto& schedule, const auto& visit) {
  visit("dp", schedule.dp);
  visit("tp", schedule.tp);
  visit("cp", schedule.cp);
  visit("pp", schedule.pp);
  visit("sp", schedule.sp);
  visit("slack", schedule.slack);
  visit("edges", schedule.edges);
  visit("microbatches", schedule.microbatches);
  visit("steps", schedule.steps);
  visit("extra_warmup", schedule.extra_warmup);
  visit("ahead", schedule.ahead);
  visit("forward_only", schedule.forward_only);
  visit("in_flight", schedule.in_flight);
  visit("ndim", schedule.ndim);
  visit("rows", schedule.rows);
  visit("element", schedule.element);
  visit("hidden", schedule.hidden);
  visit("path", schedule.path);
  visit("chunks", schedule.chunks);
  visit("chunk_bytes", schedule.chunk_bytes);
  visit("links", schedule.links);
};

/// A bridge of the schedule: an edge of the graph, or a hop between two stages of a module.
struct Link {
  std::size_t id = 0;
  std::vector<Setting> settings;  ///< by microbatch, one where all are alike
  bool is_hop = false;
  std::size_t from = 0;
  std::size_t to = 0;
  std::int64_t stage = 0;  ///< of a hop: the sending one
};

/// The receives of one direction of one link on one rank: class Receives of overlap.py.
class Receives {
 public:
  Receives(std::size_t channel, std::int64_t ahead, std::vector<Simulator::Step>& script)
      : channel_(channel), ahead_(ahead), script_(&script) {}

  void begin(std::int64_t expected) { expected_ = ahead_ > 0 ? expected : 0; }
  void expect() {
    if (ahead_ == 0) return;
    ++expected_;
    fill();
  }
  void take() {
    if (posted_ > 0) {
      --posted_;
    } else {
      post();
      expected_ = std::max<std::int64_t>(0, expected_ - 1);
    }
    fill();
  }
  void wait() { script_->push_back({Simulator::Do::kWait, channel_}); }

 private:
  void post() { script_->push_back({Simulator::Do::kPost, channel_}); }
  void fill() {
    for (; expected_ > 0 && posted_ < ahead_; --expected_, ++posted_) post();
  }

  std::size_t channel_;
  std::int64_t ahead_;
  std::vector<Simulator::Step>* script_;
  std::int64_t expected_ = 0;
  std::int64_t posted_ = 0;
};

/// The channels of one rank.
struct RankLinks {
  std::size_t module = 0;
  std::int64_t stage = 0;
  std::vector<std::pair<std::size_t, std::size_t>> inputs;   ///< forward channel, backward channel
  std::vector<std::pair<std::size_t, std::size_t>> outputs;  ///< likewise
};

class Model {
 public:
  Model(const Schedule& schedule, Simulator& simulator) : schedule_(schedule), simulator_(simulator) {
    std::int64_t rank = 0;
    for (std::size_t module = 0; module < schedule.modules(); ++module) {
      first_rank_.push_back(rank);
      rank += width(module) * schedule.pp[module];
    }
    for (std::size_t module = 0; module < schedule.modules(); ++module) {
      for (std::int64_t stage = 0; stage < schedule.pp[module]; ++stage) {
        for (std::int64_t index = 0; index < width(module); ++index) {
          RankLinks& links = ranks_[static_cast<int>(rank_of(module, stage) + index)];
          links.module = module;
          links.stage = stage;
        }
      }
    }
    for (std::int64_t edge : schedule.edges) add_edge(at(edge / 10), at(edge % 10));
    for (std::size_t module = 0; module < schedule.modules(); ++module) {
      for (std::int64_t stage = 0; stage + 1 < schedule.pp[module]; ++stage) add_hop(module, stage);
    }
    for (const auto& [number, links] : ranks_) simulator_.add_caller(number, script_of(links));
  }

 private:
  std::int64_t width(std::size_t module) const {
    return schedule_.dp[module] * schedule_.tp[module] * schedule_.cp[module];
  }
  std::int64_t rank_of(std::size_t module, std::int64_t stage) const {
    return first_rank_[module] + stage * width(module);
  }
  std::int64_t all_microbatches() const { return schedule_.microbatches * schedule_.steps; }

  Setting common() const {
    Setting setting;
    setting.element = schedule_.element;
    setting.path = schedule_.path;
    setting.chunks = schedule_.chunks;
    setting.chunk_bytes = schedule_.chunk_bytes;
    setting.links = schedule_.links;
    setting.hidden = schedule_.hidden;
    return setting;
  }

  void add_edge(std::size_t from, std::size_t to) {
    Link link{2 * links_, {}, false, from, to, 0};
    Setting setting = common();
    const bool flat = schedule_.ndim == 2;
    const auto side = [&](std::size_t module, std::int64_t stage) {
      // Rows that one side cannot know are refused: shards of ragged rows.
      return Side{schedule_.dp[module],
                  schedule_.tp[module],
                  schedule_.cp[module],
                  0,
                  flat ? 0 : schedule_.sp[module],
                  rank_of(module, stage),
                  0};
    };
    setting.src = side(from, schedule_.pp[from] - 1);
    setting.dst = side(to, 0);
    setting.samples = std::lcm(setting.src.lanes, setting.dst.lanes);
    if (flat) {
      setting.ndim = 2;
      setting.told = (std::int64_t{1} << setting.src.lanes) - 1;
      Draw random(static_cast<std::uint64_t>(schedule_.rows) + 77 * (10 * from + to));
      for (std::int64_t microbatch = 0; microbatch < all_microbatches(); ++microbatch) {
        setting.rows.clear();
        for (std::int64_t sample = 0; sample < setting.samples; ++sample) setting.rows.push_back(random(0, 5));
        link.settings.push_back(setting);
      }
    } else {
      setting.ndim = 3;
      setting.seq = 5;
      link.settings.push_back(setting);
    }
    connect(link);
  }

  void add_hop(std::size_t module, std::int64_t stage) {
    Link link{2 * links_, {}, true, module, module, stage};
    Setting setting = common();
    setting.ndim = 3;
    setting.samples = width(module);
    setting.seq = 3;
    setting.src.lanes = setting.dst.lanes = width(module);
    setting.src.first = rank_of(module, stage);
    setting.dst.first = rank_of(module, stage + 1);
    link.settings.push_back(setting);
    connect(link);
  }

  void connect(const Link& link) {
    ++links_;
    const Setting& first = link.settings.front();
    const auto sides = std::make_shared<const core::Sides>(first.source(), first.destination());
    const std::int64_t allowed = schedule_.in_flight > 0 ? schedule_.in_flight : schedule_.most_in_flight();
    std::map<int, std::pair<std::size_t, std::size_t>> channels;
    for (const auto direction : {core::Direction::kForward, core::Direction::kBackward}) {
      const bool forward = direction == core::Direction::kForward;
      std::map<int, ChannelOrders*> by_rank;
      for (std::int64_t microbatch = 0; microbatch < all_microbatches(); ++microbatch) {
        const bool once = link.settings.size() == 1;
        if (microbatch == 0 || !once) way_ = orders_of(link.settings[once ? 0 : at(microbatch)], sides, direction);
        const auto of = [&](int rank) -> ChannelOrders& {
          const auto [found, is_new] = by_rank.try_emplace(rank, nullptr);
          if (!is_new) return *found->second;
          ChannelOrders& orders = orders_.emplace_back();
          found->second = &orders;
          orders.name = std::string(forward ? "forward" : "backward") + (link.is_hop ? " of hop " : " of edge ") +
                        std::to_string(link.from) + " -> " + std::to_string(link.to);
          orders.id = static_cast<int>(link.id) + (forward ? 0 : 1);
          orders.window = std::max<std::int64_t>(1, (std::int64_t{1} << 20) / schedule_.element);
          orders.in_flight = allowed;
          find_header_peers(forward ? sides->source() : sides->destination(),
                            forward ? sides->destination() : sides->source(), rank, orders);
          return orders;
        };
        for (const Sender& sender : way_.senders) of(sender.rank).sends.push_back(sender.order);
        for (const Receiver& receiver : way_.receivers) of(receiver.rank).receives.push_back(receiver.order);
      }
      for (const auto& [rank, orders] : by_rank) {
        if (!forward && schedule_.forward_only != 0) {
          orders->sends.clear();
          orders->receives.clear();
        }
        const std::size_t channel = simulator_.add_channel(rank, *orders);
        (forward ? channels[rank].first : channels[rank].second) = channel;
      }
    }
    for (const auto& [rank, pair] : channels) {
      (sides->find_source(rank).first >= 0 ? ranks_[rank].outputs : ranks_[rank].inputs).push_back(pair);
    }
  }

  std::vector<Simulator::Step> script_of(const RankLinks& links) const {
    std::vector<Simulator::Step> script;
    std::vector<Receives> activations;
    std::vector<Receives> gradients;
    for (const auto& [forward, backward] : links.inputs) activations.emplace_back(forward, schedule_.ahead, script);
    const bool forward_only = schedule_.forward_only != 0;
    for (const auto& [forward, backward] : links.outputs) {
      gradients.emplace_back(backward, forward_only ? 0 : schedule_.ahead, script);
    }
    const auto recv_all = [](std::vector<Receives>& all) {
      for (Receives& one : all) one.take();
      for (Receives& one : all) one.wait();
    };
    const auto recv_forward = [&] { recv_all(activations); };
    const auto recv_backward = [&] { recv_all(gradients); };
    const auto send_forward = [&] {
      for (std::size_t index = 0; index < links.outputs.size(); ++index) {
        script.push_back({Simulator::Do::kSend, links.outputs[index].first});
        gradients[index].expect();
      }
    };
    const auto send_backward = [&] {
      for (const auto& [forward, backward] : links.inputs) script.push_back({Simulator::Do::kSend, backward});
    };
    const std::int64_t number = schedule_.microbatches;
    const std::int64_t behind = schedule_.total_stages() - schedule_.stages_to(links.module, links.stage);
    const std::int64_t warmup = std::min(number, behind * (1 + schedule_.extra_warmup) + schedule_.slack[links.module]);
    for (std::int64_t step = 0; step < schedule_.steps; ++step) {
      for (Receives& one : activations) one.begin(number);
      for (std::int64_t microbatch = 0; microbatch < warmup; ++microbatch) {
        recv_forward();
        send_forward();
      }
      if (warmup < number) recv_forward();
      for (std::int64_t microbatch = warmup; microbatch < number; ++microbatch) {
        const bool last = microbatch + 1 == number;
        send_forward();
        if (forward_only) {
          if (!last) recv_forward();
          continue;
        }
        recv_backward();
        send_backward();
        if (!last) recv_forward();
      }
      for (std::int64_t microbatch = 0; !forward_only && microbatch < warmup; ++microbatch) {
        recv_backward();
        send_backward();
      }
    }
    return script;
  }

  const Schedule& schedule_;
  Simulator& simulator_;
  std::vector<std::int64_t> first_rank_;
  std::map<int, RankLinks> ranks_;
  std::deque<ChannelOrders> orders_;
  OneWay way_{};
  std::size_t links_ = 0;
};

}  // namespace

Schedule Schedule::parse(const std::string& text) {
  return parse_fields<Schedule>(text, kFields);
}

std::string Schedule::to_string() const {
  return print_fields(*this, kFields);
}

bool Schedule::valid() const {
  const std::size_t count = modules();
  if (count < 1 || count > 9 || microbatches < 1 || steps < 1 || element < 1 || hidden < 1 || chunks < 1 ||
      chunk_bytes < 1) {
    return false;
  }
  for (const auto* list : {&tp, &cp, &pp, &sp, &slack}) {
    if (list->size() != count) return false;
  }
  for (const auto* list : {&dp, &tp, &cp, &pp}) {
    if (*std::min_element(list->begin(), list->end()) < 1) return false;
  }
  std::set<std::int64_t> seen;
  for (std::int64_t edge : edges) {
    const auto from = at(edge / 10);
    const auto to = at(edge % 10);
    if (from >= to || to >= count || !seen.insert(edge).second) return false;
    if (slack[from] < slack[to]) return false;  // a stage that is no further ahead than the next one waits for it
  }
  return true;
}

std::vector<Schedule> Schedule::simpler() const {
  std::vector<Schedule> found;
  const auto consider = [&](Schedule candidate) {
    if (candidate.valid() && !(candidate == *this)) found.push_back(std::move(candidate));
  };
  for (std::size_t module = 0; modules() > 1 && module < modules(); ++module) {
    Schedule fewer = *this;
    for (auto* list : {&fewer.dp, &fewer.tp, &fewer.cp, &fewer.pp, &fewer.sp, &fewer.slack}) {
      list->erase(list->begin() + static_cast<std::ptrdiff_t>(module));
    }
    fewer.edges.clear();
    for (std::int64_t edge : edges) {
      const auto from = edge / 10;
      const auto to = edge % 10;
      const auto gone = static_cast<std::int64_t>(module);
      if (from != gone && to != gone) fewer.edges.push_back(10 * (from - (from > gone)) + to - (to > gone));
    }
    consider(std::move(fewer));
  }
  for (std::size_t edge = 0; edge < edges.size(); ++edge) {
    Schedule fewer = *this;
    fewer.edges.erase(fewer.edges.begin() + static_cast<std::ptrdiff_t>(edge));
    consider(std::move(fewer));
  }
  const Schedule defaults;
  std::vector<std::int64_t> usual;
  const auto each = [](Schedule& schedule, const auto& visit) {
    kFields(schedule, [&](const std::string& name, auto& field) {
      if constexpr (std::is_same_v<std::decay_t<decltype(field)>, std::int64_t>) {
        visit(name, field);
      } else if (name != "edges") {
        for (std::int64_t& entry : field) visit(name, entry);
      }
    });
  };
  Schedule copy = defaults;
  std::map<std::string, std::int64_t> default_of;
  each(copy, [&](const std::string& name, std::int64_t& value) { default_of[name] = value; });
  std::size_t numbers = 0;
  copy = *this;
  each(copy, [&](const std::string&, std::int64_t&) { ++numbers; });
  for (std::size_t chosen = 0; chosen < numbers; ++chosen) {
    for (int way = 0; way < 3; ++way) {
      Schedule smaller = *this;
      std::size_t index = 0;
      each(smaller, [&](const std::string& name, std::int64_t& value) {
        const std::int64_t least = default_of[name];
        if (index++ != chosen || value == least) return;
        value = way == 0 ? least : way == 1 ? (value + least) / 2 : value + (value < least ? 1 : -1);
      });
      consider(std::move(smaller));
    }
  }
  return found;
}

std::int64_t Schedule::stages_to(std::size_t module, std::int64_t stage) const {
  std::int64_t before = 0;
  for (std::int64_t edge : edges) {
    if (at(edge % 10) == module) before = std::max(before, stages_to(at(edge / 10), pp[at(edge / 10)] - 1));
  }
  return before + stage + 1;
}

std::int64_t Schedule::total_stages() const {
  std::int64_t most = 0;
  for (std::size_t module = 0; module < modules(); ++module) {
    most = std::max(most, stages_to(module, pp[module] - 1));
  }
  return most;
}

std::int64_t Schedule::most_in_flight() const {
  return (total_stages() - 1) * (1 + extra_warmup) + 2 + *std::max_element(slack.begin(), slack.end());
}

Schedule draw_schedule(std::uint64_t seed, std::uint64_t index) {
  Draw random(seed * 0x9e3779b97f4a7c15ULL + index + 0x5c4ed01eULL);
  Schedule schedule;
  const auto count = at(random(1, 4));
  for (auto* list : {&schedule.dp, &schedule.tp, &schedule.cp, &schedule.pp, &schedule.sp, &schedule.slack}) {
    list->assign(count, 0);
  }
  for (std::size_t module = 0; module < count; ++module) {
    schedule.dp[module] = random(1, 3);
    schedule.tp[module] = random(1, 3);
    schedule.cp[module] = random.once_in(3) ? 2 : 1;
    schedule.pp[module] = random.once_in(8) ? random(4, 6) : random(1, 3);
    schedule.sp[module] = random.once_in(3) ? 1 : 0;
  }
  for (std::size_t to = 1; to < count; ++to) {
    std::vector<std::int64_t> into;
    for (std::size_t from = 0; from < to; ++from) {
      if (random.once_in(2)) into.push_back(static_cast<std::int64_t>(10 * from + to));
    }
    if (into.empty()) into.push_back(static_cast<std::int64_t>(10 * (to - 1) + to));
    schedule.edges.insert(schedule.edges.end(), into.begin(), into.end());
  }
  if (random.once_in(4)) {
    for (std::size_t module = count; module-- > 0;) {
      schedule.slack[module] = random(0, 3);
      for (std::int64_t edge : schedule.edges) {
        if (at(edge / 10) == module) {
          schedule.slack[module] = std::max(schedule.slack[module], schedule.slack[at(edge % 10)]);
        }
      }
    }
  }
  schedule.microbatches = random.once_in(4) ? random(9, 24) : random(1, 8);
  schedule.steps = random.once_in(4) ? 2 : 1;
  schedule.ahead = random.one_of({0, 1, 1, 2, 3});
  schedule.extra_warmup = schedule.ahead > 0 && random.once_in(2) ? random(1, 6) : 0;
  schedule.forward_only = random.once_in(6) ? 1 : 0;
  schedule.ndim = random(2, 3);
  schedule.rows = random(0, 1'000'000);
  schedule.element = random.one_of({1, 2, 64});
  schedule.hidden = random.one_of({2, 2, 600, 6000});
  schedule.path = random(0, 3);
  schedule.chunks = random.one_of({1, 2, 8});
  schedule.chunk_bytes = random.one_of({1, 4, 65536});
  schedule.links = random.once_in(2) ? 0 : random(1, 4);
  return schedule;
}

Outcome check(const Schedule& schedule) {
  if (!schedule.valid()) throw std::invalid_argument("not a valid schedule");
  core::Fnv fnv;
  fnv.add(schedule.to_string());
  Outcome outcome;
  const auto order = static_cast<Simulator::Order>(fnv.value() % 3);
  Simulator simulator(order, fnv.value());
  const Model model(schedule, simulator);
  simulator.run();
  outcome.messages = simulator.messages();
  fnv.add(static_cast<std::int64_t>(outcome.messages));
  outcome.hash = fnv.value();
  return outcome;
}

}  // namespace mimo_ext::properties
