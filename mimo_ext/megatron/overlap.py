"""Receives that are posted before the schedule asks for them, so that transfers overlap with compute.

    forward_backward_func = overlapped(forward_backward_pipelining_without_interleaving)
    losses = forward_backward_func(..., p2p_communicator=communicator)

or, around any schedule, `with communicator.overlap(num_microbatches): ...`. A message can only travel once its receiver
has posted a receive for it. Megatron's schedule asks for a tensor when it has nothing left to compute without it; here
the next microbatch's activation is asked for while this one is computed, and the next gradient as soon as the
activation that it belongs to has been sent. The schedule is the same, and so is every value.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

__all__ = ["overlapped"]

_Result = TypeVar("_Result")


class Post(Protocol):
    """Posts a receive; `waits_soon` as `Bridge.irecv_forward` has it."""

    def __call__(self, *, waits_soon: bool) -> Handle: ...


class Handle(Protocol):
    """A receive that is under way."""

    def wait(self) -> Any: ...

    def done(self) -> bool: ...


class Receives:
    """The receives of one direction of one link, in the order in which the schedule asks for them.

    Args:
        bridge: the link.
        post: posts a receive on it.
        name: for messages, e.g. "rank 3, module language: activation over 'images -> language'".
        posts_ahead: whether a receive can be posted before the schedule asks for it.
    """

    def __init__(self, bridge: Any, post: Post, name: str, posts_ahead: bool = True) -> None:
        self.bridge = bridge
        self.name = name
        self._post = post
        self._posts_ahead = posts_ahead
        self._posted: deque[tuple[Handle, bool]] = deque()  # with the grad mode that they were posted under
        self._expected = 0  # receives that the schedule is going to ask for, without those that are posted
        self._ahead = 0

    @property
    def arrived(self) -> int:
        """Of the `posted` ones those that could be handed out at once, up to the first that could not."""
        return next((n for n, (handle, _) in enumerate(self._posted) if not handle.done()), len(self._posted))

    @property
    def posted(self) -> int:
        """Receives that are posted and that the schedule has not asked for yet."""
        return len(self._posted)

    def begin(self, expected: int, ahead: int) -> None:
        """From now on keep up to `ahead` receives posted, `expected` in all (see `expect` for more)."""
        if self._ahead:
            raise RuntimeError(f"{self.name}: receives are posted ahead already: overlap() within overlap()")
        if self._posts_ahead:
            # The first is posted when the schedule asks for it: it may turn autograd off before.
            self._expected, self._ahead = max(0, expected - len(self._posted)), ahead

    def expect(self) -> None:
        """The schedule is going to ask for one more."""
        if self._ahead:
            self._expected += 1
            self._fill()

    def end(self) -> None:
        """Post none but those that are asked for. What is posted is handed out first."""
        self._expected = self._ahead = 0

    def take(self) -> Handle:
        """The receive that the schedule asks for; posts those that are to be under way meanwhile.

        Raises:
            RuntimeError: it was posted for a schedule that failed, under another grad mode.
        """
        if self._posted:
            handle, grad_mode = self._posted[0]
            if grad_mode != torch.is_grad_enabled():
                raise RuntimeError(
                    f"{self.name}: expected grad mode {'on' if grad_mode else 'off'}, as when this receive was posted "
                    f"ahead, got {'off' if grad_mode else 'on'}: the schedule that asked for it has failed; close the "
                    "communicator and make another"
                )
            self._posted.popleft()
        else:
            handle = self._post(waits_soon=True)
            self._expected = max(0, self._expected - 1)
        self._fill()
        return handle

    def _fill(self) -> None:
        while self._expected > 0 and len(self._posted) < self._ahead:
            self._posted.append((self._post(waits_soon=False), torch.is_grad_enabled()))
            self._expected -= 1


@contextmanager
def overlapping(
    activations: Sequence[Receives],
    gradients: Sequence[Receives],
    num_microbatches: int,
    forward_only: bool,
    ahead: int,
) -> Iterator[None]:
    """What `MultiModulePipelineCommunicator.overlap` does, on the links of one rank."""
    check_count("num_microbatches", num_microbatches, 0)
    check_count("ahead", ahead, 1)
    links = [*activations, *gradients]
    try:
        for link in activations:
            link.begin(num_microbatches, ahead)
        for link in gradients:
            # Expected as soon as the activation has been sent, never before.
            link.begin(0, 0 if forward_only else ahead)
        yield
    finally:
        for link in links:
            link.end()
    left = [f"{link.name} ({link.posted})" for link in links if link.posted]
    if left:
        raise RuntimeError(
            f"expected a schedule of {num_microbatches} microbatches, got one that has ended with receives still "
            f"posted: {', '.join(left)}; num_microbatches (and forward_only) must be those of the schedule"
        )


def check_count(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless it is an integer, and large enough."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of {least} or more, got {value!r}")


def overlapped(
    forward_backward_func: Callable[..., _Result], ahead: int = 1, extra_warmup: int = 0
) -> Callable[..., _Result]:
    """A pipeline schedule of Megatron's, with receives posted ahead.

    It takes the schedule's own arguments, and reads `p2p_communicator`, `num_microbatches` and `forward_only` of the
    call. With a communicator that has no `overlap` (or none) it is the schedule itself. The result is the schedule's.

    Args:
        forward_backward_func: e.g. `forward_backward_pipelining_without_interleaving`; arguments by keyword.
        ahead, extra_warmup: see `MultiModulePipelineCommunicator.overlap`.
    """

    @functools.wraps(forward_backward_func)
    def schedule(*args: Any, **kwargs: Any) -> _Result:
        overlap = getattr(kwargs.get("p2p_communicator"), "overlap", None)
        if not callable(overlap):
            return forward_backward_func(*args, **kwargs)
        options = {"forward_only": bool(kwargs.get("forward_only", False)), "ahead": ahead}
        with overlap(kwargs["num_microbatches"], **options, extra_warmup=extra_warmup):
            return forward_backward_func(*args, **kwargs)

    return schedule
