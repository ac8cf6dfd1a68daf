#include "setting.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "fields.h"

namespace mimo_ext::properties {

namespace {

const auto kFields = [](auto& setting, const auto& visit) {
  const auto side = [&](const std::string& name, auto& of) {
    visit(name + ".lanes", of.lanes);
    visit(name + ".tp", of.tp);
    visit(name + ".cp", of.cp);
    visit(name + ".placement", of.placement);
    visit(name + ".sp", of.sp);
    visit(name + ".first", of.first);
    visit(name + ".mixed", of.mixed);
  };
  side("src", setting.src);
  side("dst", setting.dst);
  visit("ndim", setting.ndim);
  visit("batch_dim", setting.batch_dim);
  visit("seq_dim", setting.seq_dim);
  visit("samples", setting.samples);
  visit("seq", setting.seq);
  visit("hidden", setting.hidden);
  visit("rows", setting.rows);
  visit("told", setting.told);
  visit("fixed", setting.fixed);
  visit("element", setting.element);
  visit("path", setting.path);
  visit("chunks", setting.chunks);
  visit("chunk_bytes", setting.chunk_bytes);
  visit("links", setting.links);
  visit("hosts", setting.hosts);
  visit("shards", setting.shards);
  visit("dealt", setting.dealt);
  visit("microbatches", setting.microbatches);
  visit("in_flight", setting.in_flight);
  visit("turns", setting.turns);
  visit("none", setting.none);
};

std::size_t at(std::int64_t index) {
  return static_cast<std::size_t>(index);
}

}  // namespace

core::Boundary Side::boundary(const char* name) const {
  core::Boundary boundary{
      name, static_cast<int>(tp), static_cast<int>(cp), static_cast<core::CpPlacement>(placement), sp != 0, {}};
  boundary.lanes.assign(at(lanes), std::vector<int>(at(tp * cp)));
  for (std::int64_t lane = 0; lane < lanes; ++lane) {
    for (std::int64_t member = 0; member < tp * cp; ++member) {
      const std::int64_t place = mixed != 0 ? member * lanes + lane : lane * tp * cp + member;
      boundary.lanes[at(lane)][at(member)] = static_cast<int>(first + place);
    }
  }
  return boundary;
}

Setting Setting::parse(const std::string& text) {
  return parse_fields<Setting>(text, kFields);
}

std::string Setting::to_string() const {
  return print_fields(*this, kFields);
}

bool Setting::valid() const {
  if (std::min({src.lanes, src.tp, src.cp, dst.lanes, dst.tp, dst.cp, hidden, element, chunks, chunk_bytes}) < 1) {
    return false;
  }
  if (microbatches < 1 || in_flight < 1 || samples < 0 || seq < 0) return false;
  if (is_3d()) return rows.empty() && shards == 0 && told == 0 && batch_dim != seq_dim;
  if (static_cast<std::int64_t>(rows.size()) != samples) return false;
  if (fixed != 0) {
    const bool ones = std::all_of(rows.begin(), rows.end(), [](std::int64_t count) { return count == 1; });
    return ones && samples % src.lanes == 0 && samples % dst.lanes == 0 && shards == 0 && told == 0;
  }
  for (std::int64_t lane = 0; lane < src.lanes; ++lane) {
    const auto first = rows.begin() + samples * lane / src.lanes;
    const auto last = rows.begin() + samples * (lane + 1) / src.lanes;
    if (!tells(lane) && std::adjacent_find(first, last, std::not_equal_to<>()) != last) return false;
  }
  return true;
}

std::vector<Setting> Setting::simpler() const {
  std::vector<Setting> found;
  const auto consider = [&](Setting setting) {
    if (setting.ndim == 2) {
      const std::int64_t usual = setting.rows.empty() ? 1 : setting.rows.back();
      setting.rows.resize(at(setting.samples), setting.fixed != 0 ? 1 : usual);
      if (setting.fixed != 0) std::fill(setting.rows.begin(), setting.rows.end(), 1);
    }
    if (setting.valid() && !(setting == *this)) found.push_back(std::move(setting));
  };
  // Every field at its default, half as large, or one less.
  std::size_t fields = 0;
  kFields(*this, [&](const std::string&, const auto&) { ++fields; });
  for (std::size_t chosen = 0; chosen < fields; ++chosen) {
    for (int way = 0; way < 3; ++way) {
      Setting smaller = *this;
      Setting defaults;
      std::vector<std::int64_t> usual;
      kFields(defaults, [&](const std::string&, auto& field) {
        if constexpr (std::is_same_v<std::decay_t<decltype(field)>, std::int64_t>) {
          usual.push_back(field);
        } else {
          usual.push_back(0);
        }
      });
      std::size_t index = 0;
      kFields(smaller, [&](const std::string&, auto& field) {
        const std::size_t mine = index++;
        if constexpr (std::is_same_v<std::decay_t<decltype(field)>, std::int64_t>) {
          if (mine != chosen || field == usual[mine]) return;
          const bool up = field < usual[mine];
          if (way == 0) field = usual[mine];
          if (way == 1) field = (field + usual[mine]) / 2;
          if (way == 2) field += up ? 1 : -1;
        }
      });
      consider(std::move(smaller));
    }
  }
  for (std::size_t sample = 0; sample < rows.size(); ++sample) {
    Setting fewer = *this;
    fewer.rows.erase(fewer.rows.begin() + static_cast<std::ptrdiff_t>(sample));
    --fewer.samples;
    consider(fewer);
    if (rows[sample] > 0) {
      fewer = *this;
      --fewer.rows[sample];
      consider(fewer);
    }
  }
  Setting equal = *this;
  std::fill(equal.rows.begin(), equal.rows.end(), 1);
  consider(equal);
  return found;
}

core::PlanOptions Setting::options() const {
  core::PlanOptions options{{static_cast<int>(chunks), chunk_bytes}, static_cast<core::Path>(path), {}};
  if (links == 0) return options;
  core::Links given;
  if (links == 2) given = {25'000'000, 10'000'000'000, 30'000, 20'000, 0};
  if (links == 3) given = {50'000'000'000, 400'000'000'000, 5'000, 1'000, 0};
  if (links == 4) given = {1'000'000, 1'000'000, 0, 0, 0};
  given.ranks_per_host = static_cast<int>(hosts);
  options.links = given;
  return options;
}

std::int64_t Setting::rows_of(std::int64_t first_sample, std::int64_t last_sample) const {
  return std::accumulate(rows.begin() + first_sample, rows.begin() + last_sample, std::int64_t{0});
}

core::Microbatch Setting::shape() const {
  core::Microbatch microbatch;
  microbatch.ndim = static_cast<int>(ndim);
  microbatch.samples = samples;
  microbatch.element_size = static_cast<int>(element);
  if (is_3d()) {
    microbatch.batch_dim = static_cast<int>(batch_dim);
    microbatch.seq_dim = static_cast<int>(seq_dim);
    microbatch.shape = {hidden, hidden, hidden};
    microbatch.shape[at(batch_dim)] = 1;
    microbatch.shape[at(seq_dim)] = seq;
  } else {
    microbatch.shape = {1, hidden, 1};
  }
  return microbatch;
}

std::vector<int> Setting::shard_of_rows() const {
  Draw random(static_cast<std::uint64_t>(dealt) * 7919 + 1);
  const std::int64_t count = shards == 1 ? dst.cp : dst.cp * dst.tp;
  std::vector<int> shard;
  const auto total = at(std::accumulate(rows.begin(), rows.end(), std::int64_t{0}));
  while (shard.size() < total) {
    const auto length = std::min(total - shard.size(), at(random(1, 4)));
    shard.insert(shard.end(), length, static_cast<int>(random(0, count - 1)));
  }
  return shard;
}

std::shared_ptr<const core::RowShards> Setting::row_shards(std::int64_t first_sample, std::int64_t last_sample) const {
  if (shards == 0) return nullptr;
  const std::vector<int> shard = shard_of_rows();
  std::vector<std::vector<core::Segment>> segments;
  auto row = at(rows_of(0, first_sample));
  for (std::int64_t sample = first_sample; sample < last_sample; ++sample) {
    auto& mine = segments.emplace_back();
    for (std::int64_t index = 0; index < rows[at(sample)]; ++index) mine.push_back({shard[row++], 1});
  }
  const std::int64_t count = shards == 1 ? dst.cp : dst.cp * dst.tp;
  return std::make_shared<const core::RowShards>(segments, static_cast<int>(count), samples, first_sample);
}

core::Microbatch Setting::microbatch() const {
  core::Microbatch all = shape();
  if (is_3d()) return all;
  if (fixed == 0) all.rows = rows;
  all.row_shards = row_shards(0, samples);
  return all;
}

core::Microbatch Setting::known_to_source(int lane) const {
  core::Microbatch known = shape();
  if (is_3d() || fixed != 0) return known;
  const std::int64_t begin = samples * lane / src.lanes;
  const std::int64_t end = samples * (lane + 1) / src.lanes;
  if (tells(lane) || shards != 0) {
    known.rows.assign(at(samples), core::kUnknownRows);
    std::copy(rows.begin() + begin, rows.begin() + end, known.rows.begin() + begin);
  } else {
    known.rows_per_sample = begin < end ? rows[at(begin)] : 0;
  }
  known.row_shards = row_shards(begin, end);
  return known;
}

core::Microbatch Setting::known_to_destination(int lane) const {
  core::Microbatch known = shape();
  if (is_3d() || fixed != 0) return known;
  const auto [first, last] = core::lanes_met(lane, static_cast<int>(dst.lanes), static_cast<int>(src.lanes));
  const core::Microbatch from_first = known_to_source(first);
  bool ragged = false;
  for (int sender = first; sender < last; ++sender) {
    const core::Microbatch theirs = known_to_source(sender);
    const std::int64_t counts = samples * (sender + 1) / src.lanes - samples * sender / src.lanes;
    // What the header says: no counts of a lane without samples, and then no rows per sample either.
    ragged = ragged || (theirs.ragged() && counts > 0) ||
             (theirs.ragged() ? 0 : theirs.rows_per_sample) != (from_first.ragged() ? 0 : from_first.rows_per_sample);
  }
  if (ragged) {
    known.rows.assign(at(samples), core::kUnknownRows);
    for (int sender = first; sender < last; ++sender) {
      const std::int64_t begin = samples * sender / src.lanes;
      const std::int64_t end = samples * (sender + 1) / src.lanes;
      if (dst.sharded() && !known_to_source(sender).ragged() && begin < end) {
        throw std::invalid_argument("expected equal rows per sample in all lanes");
      }
      std::copy(rows.begin() + begin, rows.begin() + end, known.rows.begin() + begin);
      if (!known_to_source(sender).ragged() || begin == end) known.even_lanes.push_back(sender);
    }
  } else {
    known.rows_per_sample = from_first.ragged() ? 0 : from_first.rows_per_sample;
  }
  known.row_shards = row_shards(samples * lane / dst.lanes, samples * (lane + 1) / dst.lanes);
  return known;
}

namespace {

Side draw_side(Draw& random, bool sharded) {
  Side side;
  side.lanes = random.once_in(3) ? random(1, 8) : random(1, 4);
  side.tp = random.once_in(8) ? random(5, 9) : random(1, 4);
  side.cp = random.once_in(2) ? 1 : random(1, 4);
  side.mixed = random.once_in(4) ? 1 : 0;
  if (sharded) {
    side.placement = random(0, 2);
    side.sp = random(0, 1);
  }
  return side;
}

void draw_rows(Draw& random, Setting& setting) {
  setting.rows.assign(at(setting.samples), random(0, 9));
  switch (random(0, 3)) {
    case 0:  // all lanes tell
      setting.told = (std::int64_t{1} << setting.src.lanes) - 1;
      for (std::int64_t& count : setting.rows) count = random(0, 9);
      break;
    case 1:  // some do; samples of the others are equal, not so the lanes
      setting.told = random(0, (std::int64_t{1} << setting.src.lanes) - 1);
      for (std::int64_t lane = 0; lane < setting.src.lanes; ++lane) {
        const std::int64_t equal = random(0, 9);
        const std::int64_t end = setting.samples * (lane + 1) / setting.src.lanes;
        for (std::int64_t sample = setting.samples * lane / setting.src.lanes; sample < end; ++sample) {
          setting.rows[at(sample)] = setting.tells(lane) ? random(0, 9) : equal;
        }
      }
      break;
    default:  // all equal
      break;
  }
}

}  // namespace

Setting draw(std::uint64_t seed, std::uint64_t index) {
  Draw random(seed * 0x9e3779b97f4a7c15ULL + index);
  Setting setting;
  const bool sharded = random.once_in(2);
  setting.ndim = random(2, 3);
  const bool dealt = !setting.is_3d() && random.once_in(4);
  setting.src = draw_side(random, sharded);
  setting.dst = draw_side(random, sharded && !dealt);
  switch (random(0, 5)) {
    case 0:  // the same ranks, or some of them
      setting.dst.first = random.one_of({0, 0, setting.src.ranks() / 2, 1});
      break;
    case 1:  // the destination comes first
      setting.src.first = setting.dst.ranks() + random(0, 2);
      break;
    default:
      setting.dst.first = setting.src.ranks() + random.one_of({0, 0, 3});
  }
  const std::int64_t unit = std::lcm(setting.src.lanes, setting.dst.lanes);
  setting.samples = random.once_in(3) ? random(0, 12) : unit * random(1, unit > 12 ? 1 : 3);
  setting.hidden = random(1, 5);
  if (setting.is_3d()) {
    setting.batch_dim = random(0, 2);
    setting.seq_dim = (setting.batch_dim + random(1, 2)) % 3;
    setting.seq = random(0, 11);
    setting.fixed = random.once_in(3) ? 1 : 0;
  } else if (random.once_in(5) && !dealt) {
    setting.samples = unit * random(1, unit > 12 ? 2 : 6);
    setting.rows.assign(at(setting.samples), 1);
    setting.fixed = 1;
  } else {
    draw_rows(random, setting);
  }
  if (dealt) {
    setting.shards = random(1, 2);
    setting.dealt = random(0, 1'000'000);
  }
  setting.element = random.one_of({1, 2, 4, 8, 64});
  // Messages of many bytes, which are not packed together, go ahead in part, and wait for their turn.
  if (random.once_in(16)) {
    setting.element = 64;
    setting.hidden = random.one_of({64, 300});
  }
  setting.path = random.one_of({0, 0, 1, 1, 2, 3});
  setting.chunks = random.one_of({1, 2, 3, 8, 8});
  setting.chunk_bytes = random.one_of({1, 2, 8, 65536});
  setting.links = random.once_in(2) ? 0 : random(1, 4);
  if (setting.links != 0) setting.hosts = random.one_of({0, 0, 1, 2, 4, 8});
  setting.microbatches = random(1, 3);
  setting.in_flight = random.one_of({1, 2, 32});
  setting.turns = random(0, 1);
  if (setting.fixed == 0 && random.once_in(4)) setting.none = random(0, (std::int64_t{1} << setting.dst.lanes) - 1);
  return setting;
}

}  // namespace mimo_ext::properties
