"""What all benchmarks are as programs: their common options, and which exit status says what."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from busy import BUSY_LIMIT, MachineBusy

MISSED = FAILED = 1
BUSY = 75  # try again later
SKIPPED = 77  # the exit status of a test that could not be run


def parser_of(doc: str | None, *, quick: str, repeats: tuple[int, int]) -> argparse.ArgumentParser:
    """A parser with --quick, --json, --repeats and --ignore-busy.

    Args:
        doc: of the program; its first line describes it.
        quick: what --quick does.
        repeats: by default; with --quick.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records to FILE")
    parser.add_argument(
        "--repeats", type=int, help=f"pairs of each measurement (default: {repeats[0]}, quick: {repeats[1]})"
    )
    parser.add_argument(
        "--ignore-busy",
        action="store_true",
        help=f"report although other work uses more than {BUSY_LIMIT * 100:.0f} %% of the machine; `busy` tells",
    )
    parser.set_defaults(_repeats=repeats)
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with a number of repeats; ends the program where that is not positive."""
    options = parser.parse_args(arguments)
    full, quick = options._repeats
    options.repeats = options.repeats or (quick if options.quick else full)
    check_positive(parser, options, "repeats")
    return options


def check_positive(parser: argparse.ArgumentParser, options: argparse.Namespace, name: str) -> None:
    """Ends the program where the option is not a positive number."""
    if getattr(options, name) < 1:
        parser.error(f"--{name}: expected a positive number, got {getattr(options, name)}")


def status_of(
    run: Callable[[], int],
    *,
    skipped: tuple[type[Exception], ...] = (),
    failed: tuple[type[Exception], ...] = (),
) -> int:
    """The program's exit status: what `run` returns, or what says why it ended; the reason goes to stderr.

    Args:
        run: the program.
        skipped: there is nothing to measure with.
        failed: what was to be measured does not work.
    """
    try:
        return run()
    except skipped as reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return SKIPPED
    except MachineBusy as reason:
        print(f"not reported: {reason}", file=sys.stderr)
        return BUSY
    except failed as failure:
        print(failure, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def told(missed: Sequence[str], otherwise: str) -> int:
    """Prints which limits were missed, or what is said otherwise; the exit status."""
    print("\n".join(missed) or f"\n{otherwise}")
    return MISSED if missed else 0
