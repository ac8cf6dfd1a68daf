#!/usr/bin/env python3
"""The adapters between tensors and the flat buffers that travel, against plain copies of the same bytes: one thread.

    python benchmarks/bench_pack.py --quick --json out/pack.json

A plain copy is `copy_` from contiguous memory to contiguous memory that reads and writes as many bytes. Cases are
boundary tensors [sequence, batch, hidden]: rows of a shard, samples of a lane, batch first. Every repeat times a case
and its copy one after the other, in an order that rotates. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P

from bench_rescale import MIB, memory_options, rotating_times
from busy import undisturbed
from command_line import status_of, told
from records import Measurement, Record, measurement, memory_table, write_json

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 1 / 1.10  # copy's time / ours
# Elements that lie together here lie far apart there: no copy of rows, and no promise.
NOT_GATED = ("pack-transposed", "unpack-transposed", "add-transposed")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    return memory_options(
        arguments, __doc__, quick="fewer repeats: under ten seconds", mib=128, size_of="the tensor in bfloat16"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return status_of(partial(report, options))


def report(options: argparse.Namespace) -> int:
    """Measure, and tell."""
    measurements = measure(options.mib * MIB, options.repeats, options.ignore_busy)
    print(memory_table(measurements))
    records = [item.record for item in measurements]
    if options.json:
        write_json(records, options.json)
    return told(missed(records), f"Within 10 % of a plain copy; not promised: {', '.join(NOT_GATED)}.")


def missed(records: Sequence[Record]) -> list[str]:
    """A line for each case that takes more than a tenth longer than its copy."""
    return [
        f"missed: {record.name}: expected at least {LIMIT:.2f}, got {record.ratio_median}"
        for record in records
        if record.name not in NOT_GATED and record.ratio_median is not None and record.ratio_median < LIMIT
    ]


def measure(num_bytes: int, repeats: int, ignore_busy: bool) -> list[Measurement]:
    """All cases, one after the other; again, where other work was busy."""
    import torch

    torch.set_num_threads(1)
    found = []
    for name, dtypes, moved, ours, copy in cases(num_bytes):
        runs = {"ours": ours, "copy": copy}
        times, busy = undisturbed(name, partial(rotating_times, runs, repeats), ignore_busy)
        found.append(
            measurement(
                name,
                None,
                moved,
                dtypes,
                released_s=times["copy"],
                method_s=times["ours"],
                bound_s=None,
                busy=busy,
            )
        )
    return found


Case = tuple[str, str, int, Callable[[], object], Callable[[], object]]


def cases(num_bytes: int) -> list[Case]:
    """Name, dtypes, bytes read and written, the run, and the copy that reads and writes as many bytes.

    Raises:
        AssertionError: a case does not compute what the reference says.
    """
    import torch

    from mimo_ext import ops, reference

    batch, hidden = 4, 2048
    sequence = num_bytes // (2 * batch * hidden)
    x = torch.empty(sequence, batch, hidden, dtype=torch.bfloat16)
    x.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    wide = x.float()
    batch_first = x.view(batch, sequence, hidden).transpose(0, 1)
    transposed = x.view(sequence * batch, hidden).t()
    half = sequence // 2
    shard = ([half // 2, 0, 0], [half, batch, hidden])
    zigzag = (
        [0, 0, 0, sequence - half // 2, 0, 0],
        [half // 2, batch, hidden, half // 2, batch, hidden],
    )
    samples = ([0, 1, 0], [sequence, 2, hidden])
    whole = ([0, 0, 0], [sequence, batch, hidden])
    all_columns = ([0, 0], list(transposed.shape))
    found: list[Case] = []

    def copy_of(read: int, written: int) -> Callable[[], object]:
        """A copy cannot read more than it writes: half of the sum each."""
        count = (read + written) // 2
        source, target = torch.ones(count, dtype=torch.uint8), torch.ones(count, dtype=torch.uint8)
        return lambda: target.copy_(source)

    def pack(name: str, tensor: Tensor, boxes: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
        buffer = torch.ones_like(reference.pack(tensor, *boxes, dtype=dtype))
        torch.ops.mimo_ext.pack_into(buffer, tensor, *boxes)
        if not torch.equal(buffer, reference.pack(tensor, *boxes, dtype=dtype)):
            raise AssertionError(f"{name}: not what the reference says")
        read = buffer.numel() * tensor.itemsize
        copy = copy_of(read, buffer.nbytes)
        run = torch.ops.mimo_ext.pack_into.default
        found.append((name, _dtypes(tensor, buffer), read + buffer.nbytes, lambda: run(buffer, tensor, *boxes), copy))

    def unpack(
        name: str, out: Tensor, boxes: tuple[list[int], list[int]], dtype: torch.dtype, accumulate: bool = False
    ) -> None:
        out = out.clone(memory_format=torch.preserve_format)
        buffer = reference.pack(out, *boxes, dtype=dtype)
        expected = out.clone()
        reference.unpack_(expected, buffer, *boxes, accumulate=accumulate)
        ops.unpack_(out, buffer, *boxes, accumulate=accumulate)
        if not torch.equal(out, expected):
            raise AssertionError(f"{name}: not what the reference says")
        written = buffer.numel() * out.itemsize
        read = buffer.nbytes + (written if accumulate else 0)
        copy = copy_of(read, written)
        run = torch.ops.mimo_ext.unpack_.default
        found.append((name, _dtypes(buffer, out), read + written, lambda: run(out, buffer, *boxes, accumulate), copy))

    pack("pack-shard", x, shard, torch.bfloat16)
    pack("pack-zigzag", x, zigzag, torch.bfloat16)
    pack("pack-samples", x, samples, torch.bfloat16)
    pack("pack-batch-first", batch_first, whole, torch.bfloat16)
    pack("pack-samples", wide, samples, torch.bfloat16)
    unpack("unpack-samples", x, samples, torch.bfloat16)
    unpack("unpack-batch-first", batch_first, whole, torch.bfloat16)
    unpack("unpack-samples", wide, samples, torch.bfloat16)
    unpack("add-samples", x, samples, torch.bfloat16, accumulate=True)
    unpack("add-samples", wide, samples, torch.float32, accumulate=True)
    unpack("add-samples", wide, samples, torch.bfloat16, accumulate=True)
    pack("pack-transposed", transposed, all_columns, torch.bfloat16)
    pack("pack-transposed", wide.view(sequence * batch, hidden).t(), all_columns, torch.bfloat16)
    unpack("unpack-transposed", transposed, all_columns, torch.bfloat16)
    unpack("add-transposed", transposed, all_columns, torch.bfloat16, accumulate=True)
    return found


def _dtypes(source: Tensor, target: Tensor) -> str:
    names = [str(tensor.dtype).removeprefix("torch.") for tensor in (source, target)]
    return names[0] if names[0] == names[1] else " to ".join(names)


if __name__ == "__main__":
    sys.exit(main())
