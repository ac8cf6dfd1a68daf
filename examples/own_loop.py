"""A training loop of one's own, two modules under 1F1B: torchrun --nproc-per-node 4 examples/own_loop.py"""

import torch
import torch.distributed as dist
from torch import nn

import mimo_ext

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same data, and the same weights within a module, on every rank
images = torch.randn(4, 8, 16)  # [microbatches, samples, features]
targets = torch.randn(4, 8, 1)
encoder, head = nn.Linear(16, 32), nn.Linear(32, 1)

vision = mimo_ext.Layout(range(2), dp=2, name="vision")  # two lanes: each encodes half of the samples
language = mimo_ext.Layout(range(2, 4), tp=2, name="language")  # one lane: both ranks get all of them
bridge = mimo_ext.Bridge(vision, language, ndim=2)
encoders = dist.new_group(vision.ranks)


def encode(mine):
    """One step of a vision rank; `mine`: [microbatches, samples of this lane, features]."""
    waiting = []
    for x in mine:
        waiting.append(encoder(x))
        if len(waiting) == 1:  # warm-up
            bridge.send_forward(waiting[0].detach())
        else:
            gradient = bridge.send_forward_recv_backward(waiting[-1].detach())
            waiting.pop(0).backward(gradient)
    waiting.pop(0).backward(bridge.recv_backward())
    for parameter in encoder.parameters():
        dist.all_reduce(parameter.grad, group=encoders)  # each lane has the gradient of its own samples


def predict(wanted):
    """One step of a language rank; returns the loss. `wanted`: [microbatches, samples, 1]."""
    total = 0.0
    y = bridge.recv_forward()  # [samples, 32], a leaf that requires grad
    for number, target in enumerate(wanted, start=1):
        loss = (head(y) - target).square().mean() / len(wanted)
        loss.backward()
        total += loss.detach()
        if number < len(wanted):
            y = bridge.send_backward_recv_forward(y.grad)
        else:
            bridge.send_backward(y.grad)
    return total


optimizer = torch.optim.SGD((encoder if bridge.is_source else head).parameters(), lr=0.1)
for step in range(5):
    optimizer.zero_grad()
    if bridge.is_source:
        encode(images.chunk(2, dim=1)[dist.get_rank()])
    else:
        loss = predict(targets)
        print(f"step {step}: loss {loss:.4f}")
    optimizer.step()
bridge.close()
dist.destroy_process_group()
