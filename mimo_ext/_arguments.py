"""What the constructor of a bridge checks on its own rank. `where` names the bridge and the rank in every message."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ._extension import _C

INT_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
LONGEST_TIMEOUT = timedelta(days=1000)  # the clock's nanoseconds must not overflow


def digest_of(text: str) -> int:
    """63 bits of a hash that headers carry: of all that is equal on every rank of the bridge."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def checked_int(where: str, what: str, value: Any, least: int, most: int = INT_MAX) -> int:
    """TypeError unless `value` is a whole number (a bool is none), ValueError unless it is in least..most."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{where}: {what}: expected an int, got {value!r} ({type(value).__name__})") from None
    if number < least and least == 1:
        raise ValueError(f"{where}: {what} must be positive, got {number}")
    if not least <= number <= most:
        raise ValueError(f"{where}: {what}: expected {least}..{most}, got {number}")
    return number


def checked_ints(where: str, what: str, values: Any) -> list[int]:
    """TypeError unless `values` are whole numbers, ValueError where one does not fit 64 bits."""
    try:
        numbers = [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"{where}: {what}: expected a list of ints, got {_short(values)}") from None
    if any(not -INT64_MAX <= number <= INT64_MAX for number in numbers):
        raise ValueError(f"{where}: {what}: expected 64-bit numbers, got {_short(numbers)}")
    return numbers


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def checked_type(where: str, what: str, value: Any, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{where}: {what}: expected {name}, got {_short(value)} ({type(value).__name__})")


def checked_timeout(where: str, timeout: Any) -> timedelta:
    checked_type(where, "timeout", timeout, timedelta, "a datetime.timedelta")
    assert isinstance(timeout, timedelta)
    if timeout < timedelta(milliseconds=1):
        raise ValueError(f"{where}: timeout must be positive (1 ms or more), got {timeout}")
    if timeout > LONGEST_TIMEOUT:
        raise ValueError(f"{where}: timeout: expected at most {LONGEST_TIMEOUT.days} days, got {timeout}")
    return timeout


def check_group(where: str, group: Any) -> None:
    """TypeError for what is no process group, ValueError for that of other ranks."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{where}: group: expected a process group that has this rank, got one of other ranks")
    if group is not None:
        checked_type(where, "group", group, dist.ProcessGroup, "a torch.distributed.ProcessGroup")


def axes_of(where: str, ndim: Any, batch_dim: Any, seq_dim: Any) -> tuple[int, int]:
    for what, value in (("ndim", ndim), ("batch_dim", batch_dim), ("seq_dim", 0 if seq_dim is None else seq_dim)):
        checked_int(where, what, value, -INT_MAX)
    if ndim not in (2, 3):
        raise ValueError(f"{where}: ndim: expected 2 or 3, got {ndim}")
    if ndim == 2:
        if batch_dim != 0 or seq_dim not in (None, 0):
            raise ValueError(f"{where}: 2-D tensors are [rows, h]: expected batch_dim=0, got {batch_dim}, {seq_dim}")
        return 0, 0
    if seq_dim is None:
        seq_dim = 1 if batch_dim == 0 else 0
    if not 0 <= batch_dim < 3 or not 0 <= seq_dim < 3 or batch_dim == seq_dim:
        raise ValueError(f"{where}: expected two axes of a 3-D tensor, got batch_dim={batch_dim}, seq_dim={seq_dim}")
    return batch_dim, seq_dim


def check_ranks(where: str, ranks: Sequence[int], members: Sequence[int]) -> None:
    """ValueError where some of `ranks` are not in the process group."""
    known = members if isinstance(members, range) else set(members)
    missing = [rank for rank in ranks if rank not in known]
    if missing:
        raise ValueError(
            f"{where}: expected ranks of the process group ({len(members)} ranks), got {_short(missing)} in the layouts"
        )


def boundary_of(where: str, what: str, layout: Any, stage: Any) -> _C.Boundary:
    number = checked_int(where, what, stage, -INT_MAX)
    try:
        boundary: _C.Boundary = layout.boundary(number)
    except IndexError as error:
        raise IndexError(f"{where}: {what}: {error}") from None
    return boundary


def links_of(where: str, links: Any) -> _C.Links:
    try:
        found: _C.Links = links.core()
    except AttributeError:
        raise TypeError(f"{where}: links: expected mimo_ext.planning.links.Links, got {_short(links)}") from None
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    return found


def static_microbatch(
    where: str, given: Any, axes: tuple[int, int, int], sides: tuple[_C.Boundary, _C.Boundary], element_size: int
) -> _C.Microbatch:
    """The microbatch of a static shape.

    Args:
        given: the shape.
        axes: number of axes, batch axis, sequence axis.
        sides: source and destination.

    Raises:
        TypeError: no list of whole numbers. ValueError: a shape that does not fit.
    """
    ndim, batch_dim, seq_dim = axes
    shape = checked_ints(where, "shape", given)
    if len(shape) != ndim or any(extent < 0 for extent in shape):
        raise ValueError(f"{where}: expected a shape of {ndim} extents, got {tuple(shape)}")
    samples = shape[batch_dim]
    source, destination = (len(side.lanes) for side in sides)
    if ndim == 2 and (samples % source or samples % destination):
        raise ValueError(
            f"{where}: expected rows that split evenly over {source} source and {destination} "
            f"destination lanes, got {samples}; without shape=, row counts may vary"
        )
    microbatch = _C.Microbatch(
        ndim=ndim, batch_dim=batch_dim, seq_dim=seq_dim, samples=samples, shape=shape, element_size=element_size
    )
    try:
        microbatch.check()
    except ValueError as error:
        raise ValueError(f"{where}: shape {tuple(shape)}: {error}") from None
    return microbatch
