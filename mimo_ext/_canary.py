"""`MIMO_EXT_CHECK=1`: every row that crosses a bridge is checked, and the first wrong one is named.

Beside each payload travels what identifies its rows: over a bridge of its own between the same ranks, cut by a plan of
its own. The sender computes it from the tensor that it was given, the receiver from the tensor that it hands out, and
from what its own place in the layout says it should be. So a row that is lost, doubled, swapped, of another sample or
changed on its way is found wherever it happened: in the plan, in packing, on the wire, in forwarding to replicas.

It costs a second message beside each, some passes over every tensor, and receives that end later than they might.
Nothing of it exists where the variable is not set: `Bridge` then is `Bridge`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._extension import _C
from .bridge import Bridge, BridgeError, Handle
from .layout import Layout
from .row_shards import RowShards

VARIABLE = "MIMO_EXT_CHECK"

_COLUMNS = 4  # of one contribution: number of the row, checksum of its bits, weighted sum and sum of magnitudes
_NUMBER, _BITS, _SUM, _MAGNITUDE = range(_COLUMNS)
_UNKNOWN = -1  # as a row's number: the sender cannot know it


class RowCheckError(BridgeError):
    """A row that came over a bridge is not the one that was sent for its place."""


def enabled() -> bool:
    """Whether bridges that are made now check their rows."""
    return os.environ.get(VARIABLE, "").strip().lower() not in ("", "0", "false", "off", "no")


def row_numbers(
    microbatch: _C.Microbatch, side: _C.Boundary, lane: int, member: int, row_shards: RowShards | None = None
) -> torch.Tensor:
    """The numbers of the rows that a member of a lane holds, in its order: ``(sample << 32) + row + 1``.

    A row of a 3-D tensor is a place in the sequence of a sample. Written without the plan's code.

    Args:
        microbatch: with the row counts of the lane's samples.
        row_shards: of this side, where its rows are dealt.

    Returns:
        int64, ``[rows]`` for 2-D tensors; ``[samples, sequence]`` of the member's part for 3-D ones.
    """
    first = microbatch.samples * lane // len(side.lanes)
    last = microbatch.samples * (lane + 1) // len(side.lanes)
    if microbatch.ndim == 3:
        places = _shard(torch.arange(microbatch.shape[microbatch.seq_dim]), side, member)
        return (torch.arange(first, last) << 32)[:, None] + places + 1
    if microbatch.rows:
        counts = torch.tensor(microbatch.rows[first:last], dtype=torch.int64)
    else:
        counts = torch.full((last - first,), microbatch.rows_per_sample, dtype=torch.int64)
    starts = counts.cumsum(0) - counts
    rows = torch.arange(int(counts.sum())) - torch.repeat_interleave(starts, counts)
    numbers = (torch.repeat_interleave(torch.arange(first, last), counts) << 32) + rows + 1
    if row_shards is None:
        return _shard(numbers, side, member)
    shard = member if row_shards.num_shards == side.tp * side.cp else member // side.tp
    mine = [
        own == shard
        for sample in range(first, last)
        for own, length in row_shards.segments(sample)
        for _ in range(length)
    ]
    return numbers[torch.tensor(mine, dtype=torch.bool)]


def _shard(rows: torch.Tensor, side: _C.Boundary, member: int) -> torch.Tensor:
    """Of the rows of a lane those that a member holds, by the placement of its side."""

    def part(of: torch.Tensor, index: int, parts: int) -> torch.Tensor:
        return of[len(of) * index // parts : len(of) * (index + 1) // parts]

    tp, cp = member % side.tp, member // side.tp
    if side.cp_placement == "contiguous":
        rows = part(rows, cp, side.cp)
    elif side.cp_placement == "zigzag":
        rows = torch.cat([part(rows, cp, 2 * side.cp), part(rows, 2 * side.cp - 1 - cp, 2 * side.cp)])
    return part(rows, tp, side.tp) if side.sequence_parallel else rows


def text_of(number: int) -> str:
    """Of a row's number, for people."""
    return f"row {(number - 1) & 0xFFFFFFFF} of sample {(number - 1) >> 32}"


def bits_of(rows: torch.Tensor) -> torch.Tensor:
    """A checksum of the bits of each row: int64 ``[rows]`` of ``[rows, h]``."""
    # By bytes, which any dtype and any h can be read as; in slices, or eight times the tensor would be needed.
    weights = torch.full((rows.size(1) * rows.element_size(),), -0x61C8864680B583EB).cumprod(0)
    read = rows.contiguous().view(torch.uint8)
    slices = [(some.long() * weights).sum(dim=1) for some in read.split(4096)]
    return torch.cat(slices) if slices else torch.zeros(0, dtype=torch.int64)


def sums_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weighted sum of each row, and that of its magnitudes: float64 ``[rows]``. Sums of rows have sums of these."""
    wide = (torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows).double()
    weights = 0.5 + torch.frac(torch.arange(1, wide.size(1) + 1, dtype=torch.float64) * 0.6180339887498949)
    return wide @ weights, wide.abs() @ weights


class CheckedBridge(Bridge):
    """A bridge that checks every row; made by `Bridge(...)` where `MIMO_EXT_CHECK` is set."""

    _checked = True

    def __init__(self, src: Layout, dst: Layout, **options: Any) -> None:
        super().__init__(src, dst, **options)
        # Contributions that a gradient is summed of: a column each, so that none hides another.
        side = self._destination
        self._contributions = side.cp if side.cp_placement == "replicated" else 1
        width = _COLUMNS * self._contributions
        shape = options.get("shape")
        if shape is not None:
            shape = [width if axis == self._hidden_dim else extent for axis, extent in enumerate(shape)]
        given = {**options, "dtype": torch.int64, "shape": shape, "name": f"{self.name} ({VARIABLE})"}
        given.update(device="cpu", transport=None)  # marks are made and compared there
        self._numbers: deque[torch.Tensor] = deque()  # of received rows whose gradient is still to be sent
        self._sent_ahead = 0  # gradients sent before the microbatch that they belong to
        self._beside = _Beside(src, dst, **given)

    # The rows of a tensor, and tensors of the rows' marks

    @property
    def _hidden_dim(self) -> int:
        return 1 if self.ndim == 2 else 3 - self.batch_dim - self.seq_dim

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """``[rows, h]``, ordered by sample, then by place."""
        if self.ndim == 3:
            x = x.movedim((self.batch_dim, self.seq_dim, self._hidden_dim), (0, 1, 2))
        x = x.detach().cpu()
        return x.reshape(-1, x.size(-1)) if x.numel() else x.new_zeros((x[..., :1].numel(), 1))

    def _like(self, x: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        """``[rows, columns]`` in the order of the axes of `x`."""
        if self.ndim == 2:
            return marks
        extents = x.size(self.batch_dim), x.size(self.seq_dim), marks.size(1)
        return marks.view(extents).movedim((0, 1, 2), (self.batch_dim, self.seq_dim, self._hidden_dim)).contiguous()

    def _marks(self, x: torch.Tensor, numbers: torch.Tensor, contribution: int) -> torch.Tensor:
        rows = self._rows(x)
        marks = torch.zeros(rows.size(0), self._contributions, _COLUMNS, dtype=torch.int64)
        mine = marks[:, contribution]
        mine[:, _NUMBER] = numbers.flatten() if numbers.numel() == rows.size(0) else _UNKNOWN
        mine[:, _BITS] = bits_of(rows)
        for column, sums in zip((_SUM, _MAGNITUDE), sums_of(rows), strict=True):
            mine[:, column] = sums.view(torch.int64)
        return self._like(x, marks.flatten(1))

    # The operations

    def _send_forward(
        self,
        x: torch.Tensor,
        row_counts: Sequence[int] | None,
        num_samples: int | None,
        row_shards: RowShards | None,
        want_delivery: bool,
    ) -> _C.Delivery | None:
        marked = x.detach().clone() if isinstance(x, torch.Tensor) else x  # the owner may free it once it is sent
        delivery = super()._send_forward(x, row_counts, num_samples, row_shards, want_delivery)
        sent = self._open.last_plan()
        assert sent is not None
        lane, member = self._source.find(self.rank)
        marks = self._marks(marked, row_numbers(sent.microbatch, self._source, lane, member), 0)
        self._beside.send_forward(marks, row_counts, num_samples, row_shards)
        return delivery

    def irecv_forward(self, row_shards: RowShards | None = None, *, waits_soon: bool = False) -> Handle:
        wants_backward = torch.is_grad_enabled()
        handle = super().irecv_forward(row_shards, waits_soon=waits_soon)
        with torch.set_grad_enabled(wants_backward):
            beside = self._beside.irecv_forward(row_shards)

        def check(y: torch.Tensor) -> torch.Tensor:
            delivery = handle._delivery
            lane, member = self._destination.find(self.rank)
            numbers = row_numbers(delivery.microbatch, self._destination, lane, member, row_shards)
            if wants_backward and delivery.expects_backward:
                if self._sent_ahead:
                    self._sent_ahead -= 1
                else:
                    self._numbers.append(numbers)
            self._check("recv_forward", delivery.sequence, y.detach(), beside.wait(), numbers, False)
            return y

        return _CheckedHandle(handle, beside, check)

    def recv_forward(self, row_shards: RowShards | None = None) -> torch.Tensor:
        received: torch.Tensor = self.irecv_forward(row_shards, waits_soon=True).wait()
        return received

    def _send_backward(self, dy: torch.Tensor | None, want_delivery: bool) -> _C.Delivery | None:
        marked = dy.detach().clone() if isinstance(dy, torch.Tensor) else dy
        delivery = super()._send_backward(dy, want_delivery)
        numbers = torch.zeros(0, dtype=torch.int64)
        if self._numbers:
            numbers = self._numbers.popleft()
        else:
            self._sent_ahead += 1
        if marked is None:
            self._beside.send_backward(None)
            return delivery
        member = self._destination.find(self.rank)[1]
        copy = member // self._destination.tp if self._contributions > 1 else 0
        self._beside.send_backward(self._marks(marked, numbers, copy))
        return delivery

    def irecv_backward(self, *, waits_soon: bool = False) -> Handle:
        handle = super().irecv_backward(waits_soon=waits_soon)
        beside = self._beside.irecv_backward()

        def check(dx: torch.Tensor | None) -> torch.Tensor | None:
            marks = beside.wait()
            sequence = handle._delivery.sequence
            if (dx is None) != (marks is None):
                raise RowCheckError(
                    f"{self._where('recv_backward', sequence)}: expected {'no' if marks is None else 'a'} gradient"
                )
            if dx is not None:
                lane, member = self._source.find(self.rank)
                numbers = row_numbers(handle._delivery.microbatch, self._source, lane, member)
                self._check("recv_backward", sequence, dx, marks, numbers, True)
            return dx

        return _CheckedHandle(handle, beside, check)

    def recv_backward(self) -> torch.Tensor | None:
        received: torch.Tensor | None = self.irecv_backward(waits_soon=True).wait()
        return received

    # The check

    def _where(self, operation: str, microbatch: int) -> str:
        return f"bridge '{self.name}', rank {self.rank}: {operation} of microbatch {microbatch} ({VARIABLE})"

    def _check(
        self,
        operation: str,
        microbatch: int,
        tensor: torch.Tensor,
        received: torch.Tensor,
        numbers: torch.Tensor,
        backward: bool,
    ) -> None:
        """Raises RowCheckError for the first row of `tensor` that is not what `received` says was sent."""
        rows = self._rows(tensor)
        marks = self._rows(received).view(-1, self._contributions, _COLUMNS)
        expected = numbers.flatten()
        where = self._where(operation, microbatch)
        if not len(rows) == len(marks) == len(expected):
            raise RowCheckError(f"{where}: expected {len(expected)} rows, got {len(rows)}, and marks of {len(marks)}")
        sent = marks[:, :, _NUMBER]
        given = sent != 0  # not those of lanes without a gradient, nor columns that nobody fills
        wrong = (given & (sent != expected[:, None]) & (sent != _UNKNOWN)).any(dim=1)
        if not backward:
            wrong |= ~given[:, 0]
        if wrong.any():
            row = int(wrong.nonzero()[0])
            got = next((int(n) for n in sent[row] if n not in (0, _UNKNOWN, int(expected[row]))), 0)
            self._raise(where, row, expected, text_of(got) if got else "none")
        bits = bits_of(rows)
        alone = given.sum(dim=1) == 1
        one = marks[:, :, _BITS].sum(dim=1)  # of columns that are not filled it is 0
        wrong = alone & (bits != one)
        wrong |= ~given.any(dim=1) & (rows != 0).any(dim=1)
        several = given.sum(dim=1) > 1
        if several.any():
            sums, _ = sums_of(rows)
            parts = marks[:, :, _SUM].contiguous().view(torch.float64)
            magnitudes = marks[:, :, _MAGNITUDE].contiguous().view(torch.float64).sum(dim=1)
            unit = torch.finfo(rows.dtype).eps if rows.dtype.is_floating_point or rows.dtype.is_complex else 0.0
            allowed = (unit + 1e-12) * self._contributions * magnitudes
            total = parts.sum(dim=1)
            equal = ((sums - total).abs() <= allowed) | (sums == total) | ~total.isfinite()
            wrong |= several & ~equal
        if wrong.any():
            row = int(wrong.nonzero()[0])
            if not alone[row]:
                self._raise(where, row, expected, "one that is not the sum of the contributions to it")
            # One that has been sent for another place?
            same = (one == bits[row]) & alone
            if same.any():
                self._raise(where, row, expected, text_of(int(expected[int(same.nonzero()[0])])))
            self._raise(where, row, expected, "a row of other bits than were sent")

    @staticmethod
    def _raise(where: str, row: int, expected: torch.Tensor, got: str) -> None:
        raise RowCheckError(
            f"{where}: row {row} of this rank's tensor: expected {text_of(int(expected[row]))}, got {got}"
        )

    # What belongs to both

    def _limit(self, microbatches: int) -> None:
        super()._limit(microbatches)
        self._beside.max_in_flight = microbatches

    def close(self, abort: bool = False) -> None:
        try:
            super().close(abort)
        finally:
            if "_beside" in self.__dict__:
                self._beside.close(abort)


class _Beside(Bridge):
    """Carries the marks: a plain bridge, whatever the environment says."""


class _CheckedHandle(Handle):
    """Of a receive, and of that of its marks."""

    def __init__(self, handle: Handle, beside: Handle, check: Callable[[Any], Any]) -> None:
        super().__init__(handle._communicator, handle._delivery, check)
        self._handle, self._marks = handle, beside

    def done(self) -> bool:
        return self._handle.done() and self._marks.done()

    def wait(self) -> Any:
        if self._finish is not None:
            self._result = self._finish(self._handle.wait())
            self._finish = None
        return self._result
