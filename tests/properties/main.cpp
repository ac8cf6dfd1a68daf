// Checks properties of many random bridges and schedules. See usage() for how; the summary's digest depends on the seed
// and on the number of cases alone.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "checks.h"
#include "core/hash.h"
#include "schedule.h"
#include "shrink.h"

namespace mimo_ext::properties {
namespace {

constexpr const char* kUsage = R"(usage: check_properties [options]
  --cases N       bridges to draw (default 100000)
  --schedules N   schedules to draw (default: a tenth of the bridges)
  --seed N        of everything that is drawn (default 1)
  --jobs N        threads (default: one per processor; the result does not depend on it)
  --case TEXT     check this one bridge, as it is printed for one that fails
  --schedule TEXT check this one schedule
  --stdin         check a line after the other: "case TEXT", "schedule TEXT"; answers "ok", "refused" or the failure
)";

struct Options {
  std::int64_t cases = 100'000;
  std::int64_t schedules = -1;
  std::uint64_t seed = 1;
  unsigned jobs = std::max(1U, std::thread::hardware_concurrency());
  std::string one_case;
  std::string one_schedule;
  bool from_stdin = false;
};

struct Totals {
  std::int64_t refused = 0;
  std::int64_t transfers = 0;
  std::int64_t messages = 0;
  std::uint64_t digest = 0;  ///< a sum: in whatever order cases come
  std::map<std::uint64_t, std::string> plans;
};

/// Throws std::runtime_error for two different bridges with one hash.
void add(Totals& totals, const Outcome& outcome, const std::string& text, std::uint64_t index) {
  core::Fnv fnv;
  fnv.add(static_cast<std::int64_t>(index));
  fnv.add(static_cast<std::int64_t>(outcome.hash));
  totals.digest += fnv.value();
  totals.refused += outcome.refused ? 1 : 0;
  totals.transfers += static_cast<std::int64_t>(outcome.transfers);
  totals.messages += static_cast<std::int64_t>(outcome.messages);
  const auto [found, is_new] = totals.plans.try_emplace(outcome.hash, text);
  if (!is_new && found->second != text) {
    throw std::runtime_error("two plans with hash " + std::to_string(outcome.hash) + ": " + found->second + " and " +
                             text);
  }
}

/// Checks cases 0 .. number - 1 on all threads; returns the index of the first failure that was found, or -1.
template <typename Case>
std::int64_t check_all(std::int64_t number, const Options& options, Totals& totals, const char* kind,
                       const Case& each) {
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::int64_t wrong = -1;
  const auto work = [&] {
    for (std::int64_t index = next++; index < number && !failed; index = next++) {
      try {
        const auto [outcome, text] = each(index);
        const std::lock_guard lock(mutex);
        add(totals, outcome, text, static_cast<std::uint64_t>(index));
      } catch (const std::exception& error) {
        const std::lock_guard lock(mutex);
        if (failed.exchange(true)) return;
        wrong = index;
        std::cerr << kind << " " << index << " of seed " << options.seed << ": " << error.what() << "\n";
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned job = 0; job < options.jobs; ++job) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  return wrong;
}

/// What a plan's hash must tell apart: not how the plan is used.
std::string plan_text(Setting setting) {
  setting.microbatches = 1;
  setting.in_flight = 32;
  setting.turns = 0;
  setting.none = 0;
  setting.told = 0;
  setting.fixed = 0;
  return setting.to_string();
}

/// Draws and checks `number` cases of a kind and says how it went. False where one has failed.
template <typename Drawn, typename Text>
bool check_kind(std::int64_t number, const Options& options, const char* kind,
                Drawn (*draw_one)(std::uint64_t, std::uint64_t), const Text& text) {
  const auto started = std::chrono::steady_clock::now();
  Totals totals;
  const std::int64_t wrong = check_all(number, options, totals, kind, [&](std::int64_t index) {
    const Drawn drawn = draw_one(options.seed, static_cast<std::uint64_t>(index));
    return std::pair(check(drawn), text(drawn));
  });
  if (wrong >= 0) {
    const Drawn drawn = draw_one(options.seed, static_cast<std::uint64_t>(wrong));
    std::cerr << report(shrink(drawn, [](const Drawn& candidate) { check(candidate); }), std::string("--") + kind);
    return false;
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
  std::printf(
      "%8lld %ss of seed %llu: all properties hold; %lld refused by design, %lld messages carried out, "
      "digest %016llx (%.1f s)\n",
      static_cast<long long>(number), kind, static_cast<unsigned long long>(options.seed),
      static_cast<long long>(totals.refused), static_cast<long long>(totals.messages),
      static_cast<unsigned long long>(totals.digest), seconds.count());
  return true;
}

int run(const Options& options) {
  const bool bridges = check_kind<Setting>(options.cases, options, "case", draw, plan_text);
  const bool schedules = check_kind<Schedule>(options.schedules, options, "schedule", draw_schedule,
                                              [](const Schedule& schedule) { return schedule.to_string(); });
  return bridges && schedules ? 0 : 1;
}

/// "ok" or "refused"; throws what the check throws.
std::string answer(const std::string& kind, const std::string& text) {
  if (kind == "case") return check(Setting::parse(text)).refused ? "refused" : "ok";
  if (kind == "schedule") return check(Schedule::parse(text)).refused ? "refused" : "ok";
  throw std::invalid_argument("'" + kind + "': expected 'case' or 'schedule'");
}

int answer_lines() {
  for (std::string line; std::getline(std::cin, line);) {
    std::string said;
    try {
      const std::size_t space = line.find(' ');
      said = answer(line.substr(0, space), space == std::string::npos ? "" : line.substr(space + 1));
    } catch (const std::exception& error) {
      said = error.what();
    }
    std::replace(said.begin(), said.end(), '\n', ';');
    std::cout << said << std::endl;
  }
  return 0;
}

Options parse(int count, char** words) {
  Options options;
  for (int index = 1; index < count; ++index) {
    const std::string name = words[index];
    if (name == "--stdin") {
      options.from_stdin = true;
      continue;
    }
    if (index + 1 == count) throw std::invalid_argument(name + ": expected a value, or another option");
    const std::string value = words[++index];
    if (name == "--cases") {
      options.cases = std::stoll(value);
    } else if (name == "--schedules") {
      options.schedules = std::stoll(value);
    } else if (name == "--seed") {
      options.seed = std::stoull(value);
    } else if (name == "--jobs") {
      options.jobs = static_cast<unsigned>(std::stoul(value));
    } else if (name == "--case") {
      options.one_case = value;
    } else if (name == "--schedule") {
      options.one_schedule = value;
    } else {
      throw std::invalid_argument(name + ": no such option");
    }
  }
  if (options.jobs < 1) throw std::invalid_argument("--jobs: expected 1 or more");
  if (options.schedules < 0) options.schedules = options.cases / 10;
  return options;
}

int main(int count, char** words) {
  try {
    const Options options = parse(count, words);
    if (options.from_stdin) return answer_lines();
    if (!options.one_case.empty() || !options.one_schedule.empty()) {
      if (!options.one_case.empty()) std::cout << answer("case", options.one_case) << "\n";
      if (!options.one_schedule.empty()) std::cout << answer("schedule", options.one_schedule) << "\n";
      return 0;
    }
    return run(options);
  } catch (const std::invalid_argument& error) {
    std::cerr << "check_properties: " << error.what() << "\n" << kUsage;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}

}  // namespace
}  // namespace mimo_ext::properties

int main(int count, char** words) {
  return mimo_ext::properties::main(count, words);
}
