"""How ranks compare what they were given, before anything is created.

They meet in the store of the default process group, not in a collective of it: three short requests per rank whatever
their number, over any backend, and a rank that never comes can be named.
"""

from __future__ import annotations

import hashlib
import json
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_PAUSE_S = 0.5  # between two questions at most
_NAMED = 16  # ranks in a message

# World -> ranks that meet (None: all) -> meetings so far. A world that is destroyed takes its numbers along.
_meetings: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...] | None, int]] = weakref.WeakKeyDictionary()


class Meeting:
    """A point that every one of `ranks` (default: of the world) comes to, in the same order of meetings.

    Args:
        what: is set up; for messages, e.g. "bridge 'images -> language'".
        ranks: that meet, in the same order on all of them; this rank is one.
        timeout: how long a rank waits for the others, at least; the timeout of the default group where that is longer.

    Attributes:
        ranks: that meet.
        store: of this meeting alone. None in a world of torch's "fake" backend, where this rank is the only real one.
        limit: how long to wait for the others.

    Raises:
        RuntimeError: torch.distributed is not initialized, or its default process group has no store (MPI).
    """

    def __init__(self, what: str, ranks: Sequence[int] | None = None, timeout: timedelta | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError(f"{what}: torch.distributed is not initialized")
        world = dist.distributed_c10d._get_default_group()
        self.what = what
        self.rank = dist.get_rank()
        everyone = range(dist.get_world_size())
        self.ranks: Sequence[int] = everyone if ranks is None else list(ranks)
        key = None if len(self.ranks) == len(everyone) else tuple(self.ranks)
        turns = _meetings.setdefault(world, {})
        self.turn = turns.get(key, 0)
        turns[key] = self.turn + 1
        self.store: dist.Store | None = None
        self.limit = timeout or timedelta(0)
        if dist.get_backend(world) == "fake":
            return
        store = dist.distributed_c10d._get_default_store()
        if store is None:
            raise RuntimeError(
                f"{what}: expected a default process group with a store (gloo, nccl), got {dist.get_backend(world)}"
            )
        self.limit = max(self.limit, store.timeout)
        some = "world" if key is None else hashlib.sha256(",".join(map(str, key)).encode()).hexdigest()[:16]
        self._here = dist.PrefixStore(f"mimo_ext/{some}/here", store)
        self._turns = dist.PrefixStore(f"mimo_ext/{some}", store)
        self.store = dist.PrefixStore(str(self.turn), self._turns)

    def compare(self, text: str) -> list[tuple[list[int], str]] | None:
        """Collective: None where every rank gives this text; else who gave what, in the order of the ranks.

        Raises:
            RuntimeError: ranks that did not come in time; they are named.
        """
        if self.store is None:
            return None
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if self._all_say(self.store, digest):
            return None
        texts = dist.PrefixStore("texts", self.store)
        texts.set(str(self.rank), text)
        if texts.add("count", 1) < len(self.ranks):
            self._wait(texts, "all")
        else:
            by_text: dict[str, list[int]] = {}
            for rank in self.ranks:
                by_text.setdefault(texts.get(str(rank)).decode(), []).append(rank)
            texts.set("all", json.dumps([[ranks, line] for line, ranks in by_text.items()]))
        return [(ranks, line) for ranks, line in json.loads(texts.get("all"))]

    def _all_say(self, store: dist.Store, digest: str) -> bool:
        self._here.set(str(self.rank), str(self.turn))
        store.add(digest, 1)
        if store.add("count", 1) < len(self.ranks):
            self._wait(store, "same")
            return store.get("same") == b"1"
        # The last to come counts: what the others have added stands by now.
        same = store.add(digest, 0) == len(self.ranks)
        store.set("same", str(int(same)))
        if self.turn:
            # All have left the meeting before this one.
            before = dist.PrefixStore(str(self.turn - 1), self._turns)
            before.delete_key("count")
            before.delete_key("same")
        return same

    def _wait(self, store: dist.Store, key: str) -> None:
        if not wait_for(store, [key], self.limit):
            raise RuntimeError(
                f"{self.what}, rank {self.rank}: waited {self.limit.total_seconds():g} s for "
                f"{ranks_text(self._missing())} to set it up, too"
            )

    def _missing(self) -> list[int]:
        return [
            rank
            for rank in self.ranks
            if not self._here.check([str(rank)]) or int(self._here.get(str(rank))) < self.turn
        ]


def wait_for(store: dist.Store, keys: list[str], limit: timedelta) -> bool:
    """Whether the keys are all there within the limit.

    The store is asked now and then: its own wait cannot be interrupted, keeps other threads from it, and complains in
    the log when a part of the limit is over.
    """
    begin = time.monotonic()
    while not store.check(keys):
        waited = time.monotonic() - begin
        if waited >= limit.total_seconds():
            return False
        # The end of a wait is noticed late by at most a quarter of it.
        time.sleep(min(max(waited / 4, 0.0002), _PAUSE_S))
    return True


def ranks_text(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 1, 2, 5 and 9 more"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"ranks {', '.join(map(str, ranks[:_NAMED]))}{more}"
