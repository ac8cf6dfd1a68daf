"""The bridge alone, on four ranks: torchrun --nproc-per-node 4 examples/quickstart.py"""

import torch
import torch.distributed as dist

import mimo_ext

dist.init_process_group("gloo")
vision = mimo_ext.Layout(ranks=range(2), dp=2, name="vision")  # two lanes of one rank
language = mimo_ext.Layout(ranks=range(2, 4), tp=2, name="language")  # one lane of two ranks
bridge = mimo_ext.Bridge(vision, language, ndim=2)
if bridge.is_source:
    rows = 3 + dist.get_rank()  # each lane has its own number of image tokens
    bridge.send_forward(torch.ones(rows, 4) * rows, row_counts=[1, rows - 1])
    print(bridge.recv_backward()[:, 0])  # rank 0: tensor([6., 6., 6.])   rank 1: tensor([8., 8., 8., 8.])
else:
    y = bridge.recv_forward()  # on both ranks [7, 4]: the rows of lane 0, then those of lane 1
    (y**2).sum().backward()
    bridge.send_backward(y.grad)
    print(y[:, 0].detach())  # tensor([3., 3., 3., 4., 4., 4., 4.])
bridge.close()
