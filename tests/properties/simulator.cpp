#include "simulator.h"

#include <algorithm>
#include <stdexcept>

namespace mimo_ext::properties {

namespace {

constexpr std::int64_t kGone = -1'000'000'007;  // what a tensor holds before anything has come, and after its end

/// Calls visit(offset in the tensor) for every element of a transfer, in the order in which it is packed.
template <typename Visit>
void each_element(const comm::Transfer& transfer, const Values& shape, const Visit& visit) {
  const std::size_t ndim = shape.size();
  for (std::size_t box = 0; box < transfer.starts.size(); box += ndim) {
    const auto axis = [&](const auto& self, std::size_t index, std::int64_t offset) -> void {
      if (index == ndim) return visit(offset);
      const std::int64_t start = offset * shape[index] + transfer.starts[box + index];
      for (std::int64_t place = start; place < start + transfer.sizes[box + index]; ++place)
        self(self, index + 1, place);
    };
    axis(axis, 0, 0);
  }
}

Values pack(const comm::Transfer& transfer, const Values& shape, const Values& tensor) {
  Values values;
  each_element(transfer, shape,
               [&](std::int64_t offset) { values.push_back(tensor.at(static_cast<std::size_t>(offset))); });
  return values;
}

void unpack(const comm::Transfer& transfer, const Values& shape, const Values& values, Values& tensor) {
  std::size_t index = 0;
  each_element(transfer, shape, [&](std::int64_t offset) {
    std::int64_t& element = tensor.at(static_cast<std::size_t>(offset));
    element = transfer.contribution > 0 ? element + values.at(index) : values.at(index);
    ++index;
  });
}

std::size_t volume_of(const Values& shape) {
  std::int64_t volume = 1;
  for (std::int64_t extent : shape) volume *= extent;
  return static_cast<std::size_t>(volume);
}

std::string text_of(std::int64_t microbatch, int id, const comm::Transfer* transfer) {
  std::string text = "microbatch " + std::to_string(microbatch) + " of channel " + std::to_string(id);
  if (transfer == nullptr) return text;
  return text + ", " + std::to_string(transfer->volume) + " elements, lanes " + std::to_string(transfer->sender_lane) +
         " -> " + std::to_string(transfer->receiver_lane) + ", chunk " + std::to_string(transfer->chunk) +
         ", contribution " + std::to_string(transfer->contribution);
}

bool same(const comm::Transfer* a, const comm::Transfer* b) {
  if (a == nullptr || b == nullptr) return a == b;
  return a->volume == b->volume && a->sender_lane == b->sender_lane && a->receiver_lane == b->receiver_lane &&
         a->chunk == b->chunk && a->contribution == b->contribution && a->with_header == b->with_header &&
         a->eager == b->eager;
}

bool has_message(const comm::Transfer& transfer) {
  return !transfer.local && !transfer.with_header && transfer.eager < transfer.volume;
}

}  // namespace

void find_header_peers(const core::Boundary& sender, const core::Boundary& receiver, int rank, ChannelOrders& orders) {
  const auto [sender_lane, sender_member] = sender.find(rank);
  const auto [receiver_lane, receiver_member] = receiver.find(rank);
  if (sender_lane >= 0) {
    const auto [first, last] = core::lanes_met(sender_lane, sender.num_lanes(), receiver.num_lanes());
    orders.meets_itself = first <= receiver_lane && receiver_lane < last;
    for (int lane = first; lane < last; ++lane) {
      for (int member = sender_member; member < receiver.lane_size(); member += sender.lane_size()) {
        const int to = receiver.lanes[static_cast<std::size_t>(lane)][static_cast<std::size_t>(member)];
        if (to != rank) orders.headers_to.push_back(to);
      }
    }
  }
  if (receiver_lane >= 0) {
    const auto [first, last] = core::lanes_met(receiver_lane, receiver.num_lanes(), sender.num_lanes());
    orders.first_sender_lane = first;
    for (int lane = first; lane < last; ++lane) {
      const auto& members = sender.lanes[static_cast<std::size_t>(lane)];
      orders.eager_bytes = comm::eager_bytes_of(sender.num_lanes(), receiver.num_lanes());
      orders.headers_from.push_back(members[static_cast<std::size_t>(receiver_member % sender.lane_size())]);
    }
  }
}

Simulator::~Simulator() {
  for (Named& named : threads_) named.thread.handle.destroy();
}

void Simulator::Wait::await_suspend(std::coroutine_handle<Thread::promise_type> handle) const {
  event.waiters.push_back(handle);
  handle.promise().waits_for =
      std::string(what) + (peer < 0 ? "" : " " + std::to_string(peer)) + ", microbatch " + std::to_string(microbatch);
}

void Simulator::set(Event& event) {
  event.done = true;
  ready_.insert(ready_.end(), event.waiters.begin(), event.waiters.end());
  event.waiters.clear();
}

std::size_t Simulator::add_channel(int rank, const ChannelOrders& orders) {
  Channel& channel = channels_.emplace_back();
  channel.rank = rank;
  channel.orders = &orders;
  for (std::size_t microbatch = 0; microbatch < orders.sends.size(); ++microbatch) {
    channel.sends.push_back(std::make_unique<Job>());
  }
  for (std::size_t microbatch = 0; microbatch < orders.receives.size(); ++microbatch) {
    channel.receives.push_back(std::make_unique<Job>());
  }
  const std::string name = "rank " + std::to_string(rank) + ", " + orders.name;
  threads_.push_back({run_sends(channel), name + " sends"});
  threads_.push_back({run_receives(channel), name + " receives"});
  return channels_.size() - 1;
}

void Simulator::add_caller(int rank, std::vector<Step> script) {
  threads_.push_back({run_caller(std::move(script)), "rank " + std::to_string(rank) + ", caller"});
}

void Simulator::run() {
  for (Named& named : threads_) ready_.push_back(named.thread.handle);
  while (!ready_.empty()) {
    std::size_t next = 0;
    if (order_ == Order::kLast) next = ready_.size() - 1;
    if (order_ == Order::kRandom)
      next = static_cast<std::size_t>(random_(0, static_cast<std::int64_t>(ready_.size()) - 1));
    const auto handle = ready_[next];
    ready_.erase(ready_.begin() + static_cast<std::ptrdiff_t>(next));
    handle.resume();
  }
  std::string stuck;
  for (Named& named : threads_) {
    const auto& promise = named.thread.handle.promise();
    if (promise.error) std::rethrow_exception(promise.error);
    if (!named.thread.handle.done()) stuck += "\n  " + named.name + " waits for " + promise.waits_for;
  }
  if (!stuck.empty()) throw std::runtime_error("deadlock:" + stuck);
  for (const auto& [stream, posted] : streams_) {
    const bool ahead = std::get<2>(stream) % kKinds == kEager;  // such receives are posted whether or not any is sent
    if (!posted.sends.empty() || (!posted.receives.empty() && !ahead))
      throw std::runtime_error("a message is left over");
  }
}

void Simulator::post(bool sending, Slot& slot, const Channel& channel, int peer, Kind kind, std::size_t microbatch) {
  slot.microbatch = static_cast<std::int64_t>(microbatch);
  slot.id = channel.orders->id;
  const int tag = slot.id * kKinds + kind;
  const Stream stream = sending ? Stream{channel.rank, peer, tag} : Stream{peer, channel.rank, tag};
  Posted& posted = streams_[stream];
  (sending ? posted.sends : posted.receives).push_back(&slot);
  while (!posted.sends.empty() && !posted.receives.empty()) {
    Slot& send = *posted.sends.front();
    Slot& receive = *posted.receives.front();
    posted.sends.pop_front();
    posted.receives.pop_front();
    meet(stream, send, receive);
  }
}

void Simulator::meet(const Stream& stream, Slot& send, Slot& receive) {
  ++messages_;
  // What is sent ahead is received by whatever was posted for the sender first: its header says whose it is.
  const bool ahead = std::get<2>(stream) % kKinds == kEager;
  if (ahead ? send.id != receive.id
            : send.microbatch != receive.microbatch || send.id != receive.id || send.volume != receive.volume ||
                  !same(send.transfer, receive.transfer)) {
    throw std::runtime_error("rank " + std::to_string(std::get<0>(stream)) + " sends " +
                             text_of(send.microbatch, send.id, send.transfer) + "; rank " +
                             std::to_string(std::get<1>(stream)) + " expects " +
                             text_of(receive.microbatch, receive.id, receive.transfer));
  }
  if (ahead) {
    receive.microbatch = send.microbatch;
    receive.volume = send.volume;
  }
  if (send.tensor != nullptr && send.transfer->in_place) {  // read when it moves
    const auto last = send.tensor->begin() + send.transfer->offset + send.transfer->volume;
    send.staged.assign(last - send.volume, last);
  }
  receive.staged = std::move(send.staged);
  if (receive.tensor != nullptr && receive.transfer->in_place) {
    const auto last = receive.tensor->begin() + receive.transfer->offset + receive.transfer->volume;
    std::copy(receive.staged.begin(), receive.staged.end(), last - receive.volume);
  }
  set(send.ended);
  set(receive.ended);
}

Simulator::Thread Simulator::run_caller(std::vector<Step> script) {
  for (const Step& step : script) {
    Channel& channel = channels_[step.channel];
    if (step.what == Do::kSend) {
      const auto room = static_cast<std::size_t>(channel.orders->in_flight);
      if (channel.sent >= room) {
        const std::size_t earlier = channel.sent - room;
        co_await Wait{channel.sends.at(earlier)->ended, "room to send", -1, static_cast<std::int64_t>(channel.sent)};
      }
      start_send(channel);
    } else if (step.what == Do::kPost) {
      post_receive(channel);
    } else {
      const std::size_t microbatch = channel.waited++;
      co_await Wait{channel.receives.at(microbatch)->ended, channel.orders->name.c_str(), -1,
                    static_cast<std::int64_t>(microbatch)};
    }
  }
}

void Simulator::start_send(Channel& channel) {
  const std::size_t microbatch = channel.sent++;
  const ChannelOrders& orders = *channel.orders;
  const comm::SendOrder& order = *orders.sends.at(microbatch);
  Job& job = *channel.sends.at(microbatch);
  if (orders.tensor) job.tensor = orders.tensor(microbatch);
  job.payload.resize(orders.sends_nothing ? 0 : order.transfers.size());
  for (std::size_t index = 0; index < job.payload.size(); ++index) {
    const comm::Transfer& transfer = order.transfers[index];
    Slot& slot = job.payload[index];
    slot.transfer = &transfer;
    slot.volume = transfer.volume - transfer.eager;
    if (!orders.tensor) continue;
    const bool apart = transfer.local || transfer.with_header || transfer.eager > 0;
    if (!transfer.in_place || apart) slot.staged = pack(transfer, order.shape, job.tensor);
    slot.tensor = apart ? nullptr : &job.tensor;
  }
  if (!orders.fixed) {
    for (int to : orders.headers_to) {
      Slot& header = job.headers.emplace_back();
      const auto announced = order.announced.find(to);
      if (!job.payload.empty() && announced != order.announced.end() &&
          order.transfers[announced->second].with_header) {
        header.staged = job.payload[announced->second].staged;
      }
      post(true, header, channel, to, kHeader, microbatch);
      if (orders.row_counts) post(true, job.row_counts.emplace_back(), channel, to, kRows, microbatch);
    }
  }
  for (Slot& slot : job.payload) {
    const comm::Transfer& transfer = *slot.transfer;
    if (transfer.eager > 0 && !transfer.local) {
      Slot& begins = job.eager.emplace_back();
      begins.transfer = &transfer;
      begins.volume = transfer.eager;
      if (orders.tensor) {
        const auto rest = slot.staged.begin() + transfer.eager;
        begins.staged.assign(slot.staged.begin(), rest);
        slot.staged.erase(slot.staged.begin(), rest);
      }
      post(true, begins, channel, transfer.peer, kEager, microbatch);
    }
    if (has_message(transfer)) post(true, slot, channel, transfer.peer, kPayload, microbatch);
  }
  for (Slot& slot : job.payload) {
    if (slot.transfer->local) job.local.push_back(std::move(slot.staged));
  }
  set(job.begun);
}

Simulator::Thread Simulator::run_sends(Channel& channel) {
  for (std::size_t microbatch = 0; microbatch < channel.sends.size(); ++microbatch) {
    Job& job = *channel.sends[microbatch];
    const auto number = static_cast<std::int64_t>(microbatch);
    co_await Wait{job.begun, "the caller to send", -1, number};
    for (std::size_t index = 0; index < job.headers.size(); ++index) {
      co_await Wait{job.headers[index].ended, "header to", channel.orders->headers_to[index], number};
      if (index < job.row_counts.size()) {
        co_await Wait{job.row_counts[index].ended, "row counts to", channel.orders->headers_to[index], number};
      }
    }
    for (Slot& slot : job.eager) co_await Wait{slot.ended, "beginning of payload to", slot.transfer->peer, number};
    for (Slot& slot : job.payload) {
      if (has_message(*slot.transfer)) co_await Wait{slot.ended, "payload to", slot.transfer->peer, number};
    }
    std::fill(job.tensor.begin(), job.tensor.end(), kGone);
    set(job.ended);
  }
}

void Simulator::post_receive(Channel& channel) {
  const std::size_t microbatch = channel.posted++;
  Job& job = *channel.receives.at(microbatch);
  if (channel.orders->fixed) {
    post_payload(channel, job, microbatch);
  } else {
    for (int from : channel.orders->headers_from) {
      Slot& slot = job.headers.emplace_back();
      if (from != channel.rank) post(false, slot, channel, from, kHeader, microbatch);
    }
    post_eager(channel);
  }
  set(job.begun);
}

void Simulator::post_eager(Channel& channel) {
  const std::vector<int>& senders = channel.orders->headers_from;
  if (channel.orders->eager_bytes == 0) return;
  channel.eager.resize(senders.size());
  ++channel.headers_expected;
  for (std::size_t index = 0; index < senders.size(); ++index) {
    while (senders[index] != channel.rank && channel.eager[index].size() < channel.headers_expected) {
      Slot& slot = eager_.emplace_back();
      channel.eager[index].push_back(&slot);
      post(false, slot, channel, senders[index], kEager, 0);
    }
  }
}

std::size_t Simulator::at_header(const Channel& channel, const comm::Transfer& transfer) {
  return static_cast<std::size_t>(transfer.sender_lane - channel.orders->first_sender_lane);
}

bool Simulator::skips(const Channel& channel, int sender_lane) {
  return channel.orders->has_gradient && !channel.orders->has_gradient(sender_lane);
}

void Simulator::post_payload(Channel& channel, Job& job, std::size_t microbatch) {
  const comm::ReceiveOrder& order = *channel.orders->receives.at(microbatch);
  const bool valued = channel.orders->received != nullptr;
  bool all = true;
  for (std::size_t index = 0; index < channel.orders->headers_from.size(); ++index) {
    all = all && !skips(channel, channel.orders->first_sender_lane + static_cast<int>(index));
  }
  if (valued) job.tensor.assign(volume_of(order.shape), all ? kGone : 0);
  const auto aim = [&](std::vector<Slot>& slots, const std::vector<comm::Transfer>& transfers) {
    slots.resize(transfers.size());
    for (std::size_t index = 0; index < transfers.size(); ++index) {
      slots[index].transfer = &transfers[index];
      const bool apart = transfers[index].with_header || transfers[index].eager > 0;
      slots[index].tensor = valued && !apart ? &job.tensor : nullptr;
      slots[index].volume = transfers[index].volume - transfers[index].eager;
    }
  };
  aim(job.payload, order.receives);
  aim(job.lane_sends, order.lane_sends);
  aim(job.lane_receives, order.lane_receives);
  post_receives(channel, job, microbatch);
  for (Slot& slot : job.lane_receives) {
    if (!skips(channel, slot.transfer->sender_lane)) post(false, slot, channel, slot.transfer->peer, kLane, microbatch);
  }
}

void Simulator::post_receives(Channel& channel, Job& job, std::size_t microbatch) {
  const bool windowed =
      !channel.orders->fixed && channel.orders->window > 0 && channel.orders->receives[microbatch]->takes_turns;
  for (; job.posted < job.payload.size() && (!windowed || job.volume < channel.orders->window); ++job.posted) {
    Slot& slot = job.payload[job.posted];
    if (slot.transfer->local || skips(channel, slot.transfer->sender_lane)) continue;
    if (slot.transfer->with_header) {
      slot.staged = job.headers[at_header(channel, *slot.transfer)].staged;
      continue;
    }
    if (!has_message(*slot.transfer)) continue;
    job.volume += slot.transfer->volume;
    post(false, slot, channel, slot.transfer->peer, kPayload, microbatch);
  }
}

Simulator::Thread Simulator::run_receives(Channel& channel) {
  const ChannelOrders& orders = *channel.orders;
  const bool valued = orders.received != nullptr;
  for (std::size_t microbatch = 0; microbatch < channel.receives.size(); ++microbatch) {
    Job& job = *channel.receives[microbatch];
    const comm::ReceiveOrder& order = *orders.receives[microbatch];
    const auto number = static_cast<std::int64_t>(microbatch);
    co_await Wait{job.begun, "the caller to receive", -1, number};
    Job* own = nullptr;
    if (orders.meets_itself) {
      own = channel.sends.at(microbatch).get();
      co_await Wait{own->begun, "this rank's own send", -1, number};
    }
    bool any = true;
    if (!orders.fixed) {
      any = false;
      for (std::size_t index = 0; index < orders.headers_from.size(); ++index) {
        const bool skipped = skips(channel, orders.first_sender_lane + static_cast<int>(index));
        any = any || !skipped;
        const int from = orders.headers_from[index];
        job.begun_with.push_back(nullptr);
        if (from == channel.rank) continue;
        co_await Wait{job.headers[index].ended, "header from", from, number};
        if (!skipped && order.announced.at(index).eager_bytes > 0) {
          if (channel.eager[index].empty()) throw std::runtime_error("payload ahead of its turn");
          job.begun_with.back() = channel.eager[index].front();
          channel.eager[index].pop_front();
        }
        if (!orders.row_counts) continue;
        Slot& slot = job.row_counts.emplace_back();
        post(false, slot, channel, from, kRows, microbatch);
        co_await Wait{slot.ended, "row counts from", from, number};
      }
      if (channel.headers_expected > 0) --channel.headers_expected;
      if (any) post_payload(channel, job, microbatch);
    }
    if (!any) {
      if (valued) orders.received(microbatch, std::nullopt);
      set(job.ended);
      continue;
    }
    for (const auto& stage : order.stages) {
      if (skips(channel, stage.sender_lane)) continue;
      for (std::size_t index = stage.first_receive; index < stage.last_receive; ++index) {
        Slot& slot = job.payload[index];
        if (slot.transfer->eager > 0 && !slot.transfer->local) {
          Slot& begins = *job.begun_with.at(at_header(channel, *slot.transfer));
          co_await Wait{begins.ended, "beginning of payload from", slot.transfer->peer, number};
          if (begins.microbatch != number || begins.volume != slot.transfer->eager) {
            throw std::runtime_error("the beginning of another payload");
          }
        }
        if (!has_message(*slot.transfer)) continue;
        co_await Wait{slot.ended, "payload from", slot.transfer->peer, number};
        job.volume -= slot.transfer->volume;
        post_receives(channel, job, microbatch);
      }
      for (std::size_t place = stage.first_receive; valued && place < stage.last_receive; ++place) {
        Slot& slot = job.payload[order.unpack_order[place]];
        const comm::Transfer& transfer = *slot.transfer;
        if (transfer.local) {
          unpack(transfer, order.shape, own->local.at(transfer.local_index), job.tensor);
        } else if (transfer.eager > 0) {
          Values all = job.begun_with.at(at_header(channel, transfer))->staged;
          all.insert(all.end(), slot.staged.begin(), slot.staged.end());
          unpack(transfer, order.shape, all, job.tensor);
        } else if (!transfer.in_place || transfer.with_header) {
          unpack(transfer, order.shape, slot.staged, job.tensor);
        }
      }
      for (std::size_t index = stage.first_send; index < stage.last_send; ++index) {
        Slot& slot = job.lane_sends[index];
        if (valued && !slot.transfer->in_place) slot.staged = pack(*slot.transfer, order.shape, job.tensor);
        post(true, slot, channel, slot.transfer->peer, kLane, microbatch);
      }
    }
    for (Slot& slot : job.lane_receives) {
      if (skips(channel, slot.transfer->sender_lane)) continue;
      co_await Wait{slot.ended, "lane copy from", slot.transfer->peer, number};
      if (valued && !slot.transfer->in_place) unpack(*slot.transfer, order.shape, slot.staged, job.tensor);
    }
    for (Slot& slot : job.lane_sends) {
      if (!skips(channel, slot.transfer->sender_lane)) {
        co_await Wait{slot.ended, "lane copy to", slot.transfer->peer, number};
      }
    }
    if (valued) {
      orders.received(microbatch, job.tensor);
      std::fill(job.tensor.begin(), job.tensor.end(), kGone);  // its new owner changes it in place
    }
    set(job.ended);
  }
}

}  // namespace mimo_ext::properties
