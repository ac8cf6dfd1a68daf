"""What bridges that were never closed still have to send when the interpreter ends."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.util
import sys
import weakref

from ._extension import _C


@functools.cache
def finish_leftovers_at_exit() -> None:
    # Once, and before the finalizer of the first bridge: at exit they run in reverse order of their creation.
    weakref.finalize(_C.Communicator, _finish_leftovers)
    if multiprocessing.parent_process() is not None:
        # A forked process ends without these.
        multiprocessing.util.Finalize(None, _finish_leftovers, exitpriority=0)


def _finish_leftovers() -> None:
    # After an error that ended the program nobody may be there to receive.
    failed = getattr(sys, "last_value", None) is not None or sys.exc_info()[0] is not None
    _C.finish_leftovers(abort=failed)
