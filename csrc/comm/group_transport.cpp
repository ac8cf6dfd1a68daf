#include "comm/group_transport.h"

#include "comm/grouped_backend.h"

namespace mimo_ext::comm {

namespace {

c10::intrusive_ptr<c10d::Backend> with_groups(c10::intrusive_ptr<c10d::Backend> backend) {
  if (backend->supportsCoalescing()) return backend;
  return c10::make_intrusive<GroupedBackend>(std::move(backend));
}

}  // namespace

GroupTransport::GroupTransport(const c10::intrusive_ptr<c10d::ProcessGroup>& group, c10::DeviceType device, int tag)
    : group_(group),
      backend_(with_groups(group->getBackend(device))),
      on_streams_(device != c10::DeviceType::CPU),
      tag_(tag) {}

Request GroupTransport::issue(const std::vector<Message>& messages) {
  try {
    backend_->startCoalescing();
    for (const Message& message : messages) {
      if (message.sending) {
        backend_->send(*message.tensor, message.index, tag_);
      } else {
        backend_->recv(*message.tensor, message.index, tag_);
      }
    }
    auto work = backend_->endCoalescing();
    // A backend that runs groups on the caller's own stream gives none; nobody would know when they are complete.
    if (!work) throw std::runtime_error("the backend gave no work for a group");
    return Request(std::move(work));
  } catch (const std::exception& error) {
    throw TransportError(error.what(), false);
  }
}

}  // namespace mimo_ext::comm
