#include "comm/program.h"

#include <ATen/Functions.h>

#include <algorithm>

#include "ops/pack.h"

namespace mimo_ext::comm {

namespace {

std::int64_t bytes_of(const std::vector<Transfer>& transfers, int element_size) {
  std::int64_t volume = 0;
  for (const Transfer& transfer : transfers) volume += transfer.local ? 0 : transfer.volume;
  return volume * element_size;
}

void find_peers(std::vector<Transfer>& transfers, const Transport& transport) {
  for (Transfer& transfer : transfers) transfer.index = transport.index_of(transfer.peer);
}

}  // namespace

Slots::Slots(const std::vector<Transfer>& transfers, const at::TensorOptions& options, const Staging* staging)
    : transfers_(transfers),
      options_(options),
      staging_(staging),
      nothing_(at::empty({0}, options).storage()),
      slots_(transfers.size()) {}

void Slots::point(std::vector<at::Tensor>& tensor, const at::Tensor& whole, std::int64_t offset,
                  std::int64_t volume) const {
  if (tensor.empty()) {
    tensor.push_back(at::empty({0}, options_));
    tensor.front().unsafeGetTensorImpl()->set_sizes_contiguous({volume});
  }
  at::TensorImpl* impl = tensor.front().unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(whole.storage());
  impl->set_storage_offset(whole.storage_offset() + offset);
}

void Slots::view(std::size_t index, const at::Tensor& whole) {
  slots_[index].staged = false;
  point(slots_[index].view, whole, transfers_[index].offset, transfers_[index].volume);
  divide(index);
}

void Slots::divide(std::size_t index) {
  const Transfer& transfer = transfers_[index];
  if (transfer.eager == 0) return;
  const at::Tensor whole = tensor(index).front();
  point(slots_[index].head, whole, 0, transfer.eager);
  point(slots_[index].rest, whole, transfer.eager, transfer.volume - transfer.eager);
}

void Slots::stage(std::size_t index) {
  Slot& slot = slots_[index];
  slot.staged = true;
  if (slot.staging.empty()) {
    const std::int64_t volume = transfers_[index].volume;
    slot.staging.push_back(staging_ ? staging_->host_memory({volume}, c10::typeMetaToScalarType(options_.dtype()))
                                    : at::empty({volume}, options_));
  }
  divide(index);
}

void Slots::load(std::size_t index, const at::Tensor& x) {
  const Transfer& transfer = transfers_[index];
  if (transfer.in_place && x.is_contiguous()) return view(index, x);
  stage(index);
  ops::pack_into(slots_[index].staging.front(), x, transfer.starts, transfer.sizes);
}

void Slots::aim(std::size_t index, const at::Tensor& result) {
  if (transfers_[index].in_place) return view(index, result);
  stage(index);
}

void Slots::unpack(std::size_t index, const at::Tensor& result) {
  if (slots_[index].staged) write_part(transfers_[index], result, slots_[index].staging.front());
}

void Slots::release() {
  for (Slot& slot : slots_) {
    slot.head_request.reset();
    slot.request.reset();
    for (auto* tensor : {&slot.view, &slot.head, &slot.rest}) {
      if (!tensor->empty()) tensor->front().unsafeGetTensorImpl()->set_storage_keep_dtype(nothing_);
    }
  }
}

at::Tensor part_of(const Transfer& transfer, const at::Tensor& x) {
  if (transfer.in_place && x.is_contiguous()) return x.view({-1}).narrow(0, transfer.offset, transfer.volume);
  return ops::pack(x, transfer.starts, transfer.sizes);
}

void write_part(const Transfer& transfer, const at::Tensor& result, const at::Tensor& buffer) {
  ops::unpack_(result, buffer, transfer.starts, transfer.sizes, transfer.contribution > 0);
}

std::int64_t eager_bytes_of(const BridgeConfig& config, int sender_lanes, int receiver_lanes) {
  return config.announces() ? eager_bytes_of(sender_lanes, receiver_lanes) : 0;
}

SendProgram::SendProgram(const BridgeConfig& config, const Transport& transport, const core::Microbatch& of,
                         core::Direction direction, std::pair<int, int> place)
    : SendOrder(send_order(config.plan(of, direction), transport.rank(), place, config.announces())),
      microbatch(std::make_shared<const core::Microbatch>(of)),
      bytes(bytes_of(transfers, of.element_size)),
      rounds(config.carrier == Carrier::kGroups ? send_rounds(*this) : std::vector<std::vector<std::size_t>>{}) {
  find_peers(transfers, transport);
}

ReceiveProgram::ReceiveProgram(const BridgeConfig& config, const Transport& transport, const core::Microbatch& of,
                               core::Direction direction, std::pair<int, int> place)
    : ReceiveOrder(receive_order(config.plan(of, direction), transport.rank(), place, config.announces())),
      microbatch(std::make_shared<const core::Microbatch>(of)),
      options(config.message_options()),
      bytes_received(bytes_of(receives, of.element_size) + bytes_of(lane_receives, of.element_size)),
      bytes_forwarded(bytes_of(lane_sends, of.element_size)),
      rounds(config.carrier == Carrier::kGroups ? receive_rounds(*this) : std::vector<ReceiveRound>{}) {
  for (std::vector<Transfer>* list : {&receives, &lane_sends, &lane_receives}) find_peers(*list, transport);
}

ReceiveProgram::Incoming::Incoming(const ReceiveProgram& program)
    : receives(program.receives, program.options),
      lane_sends(program.lane_sends, program.options),
      lane_receives(program.lane_receives, program.options) {}

bool ReceiveProgram::Incoming::skips(int sender_lane) const {
  return std::find(without_gradient.begin(), without_gradient.end(), sender_lane) != without_gradient.end();
}

std::unique_ptr<ReceiveProgram::Incoming> ReceiveProgram::take() {
  auto incoming = pool_.take();
  return incoming ? std::move(incoming) : std::make_unique<Incoming>(*this);
}

void ReceiveProgram::give(std::unique_ptr<Incoming> incoming) {
  incoming->result.reset();
  incoming->receives.release();
  incoming->lane_sends.release();
  incoming->lane_receives.release();
  incoming->without_gradient.clear();
  incoming->progress = {};
  incoming->posted = 0;
  incoming->volume = 0;
  pool_.give(std::move(incoming));
}

}  // namespace mimo_ext::comm
