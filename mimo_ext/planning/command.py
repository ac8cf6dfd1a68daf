"""The command `python -m mimo_ext plan`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from .. import _flight_command
from ..layout import PATHS
from . import links as model
from .edge import Edge, parse_layout
from .links import Links
from .report import compare, report_dict, report_text
from .traffic import BROADCASTS

DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "int64", "int32", "uint8")
DIRECTIONS = {"forward": ("forward",), "backward": ("backward",), "both": ("forward", "backward")}
DESCRIPTION = """\
Print who sends what to whom between two modules, how many bytes that is on every link and how long it would take,
against the released way (the whole lane through one leader rank, two messages with the shape, a broadcast in the lane).
Nothing is sent and no rank is started.
"""
EXAMPLES = """\
layouts:
  "tp=4,dp=2"                                   sizes that are not named (tp, cp, dp, pp) are 1
  "ranks=8-15,tp=4,dp=2"                        default: ranks from 0; the destination's follow the source's
  "tp=8,sequence_parallel=yes"                  each tp rank holds a shard of the sequence axis: only that travels
  "tp=2,cp=4,cp_placement=zigzag"               or contiguous; default: every cp rank holds all of it
  "vision: dp=8,tp=2,order=dp-tp-cp-pp"         a name, and which dim varies fastest

example:
  python -m mimo_ext plan --source "tp=8,dp=64" --destination "tp=8,cp=4,dp=16" --rows 4096 --png plan.png

"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def add_to(commands: argparse._SubParsersAction[_Parser]) -> None:
    """Add the command to those of `python -m mimo_ext`."""
    parser = commands.add_parser(
        "plan",
        help="who sends what to whom between two layouts, and how long it would take",
        description=DESCRIPTION,
        epilog=f"{EXAMPLES}the model of the time:\n{_indented(model.__doc__ or '')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    layout = parser.add_argument_group("what is moved")
    layout.add_argument("--source", required=True, metavar="LAYOUT", help="layout of the module that sends forward")
    layout.add_argument("--destination", required=True, metavar="LAYOUT", help="layout of the module that receives")
    layout.add_argument("--samples", type=int, help="of the global microbatch; default: one per lane of the wider side")
    layout.add_argument(
        "--rows", type=_rows, default=1024, help="tokens of a sample, or one count per sample: 700,12,1024 (2-D)"
    )
    layout.add_argument("--hidden", type=int, default=4096, help="extent of the last axis (default %(default)s)")
    layout.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default %(default)s")
    layout.add_argument(
        "--ndim", type=int, choices=(2, 3), default=2, help="2: [rows, hidden] (default), 3: with samples"
    )
    layout.add_argument("--batch-dim", type=int, choices=(0, 1), default=0, help="3-D: which axis is the samples'")
    layout.add_argument("--direction", choices=DIRECTIONS, default="both", help="default %(default)s")
    layout.add_argument(
        "--max-chunks", type=int, default=8, help="in which lane copies follow what arrives, as of Bridge (default 8)"
    )
    layout.add_argument(
        "--path",
        choices=PATHS,
        default="auto",
        help="how replicas in a lane come by their copies, as of Bridge; auto (default): the fastest on these links",
    )
    default = Links()
    cluster = parser.add_argument_group("what it is moved over")
    cluster.add_argument("--ranks-per-host", type=int, default=default.ranks_per_host, help="default %(default)s")
    cluster.add_argument(
        "--nic-gbps",
        type=float,
        default=8 * default.nic / 1e9,
        help="Gbit/s of a rank's network card (default %(default)g)",
    )
    cluster.add_argument(
        "--nvlink-gbps",
        type=float,
        default=8 * default.host / 1e9,
        help="Gbit/s of a rank inside its host (default %(default)g)",
    )
    cluster.add_argument("--latency-us", type=float, default=1e6 * default.latency, help="default %(default)g")
    cluster.add_argument(
        "--overhead-us",
        type=float,
        default=1e6 * default.overhead,
        help="link time of a message besides its bytes (default %(default)g)",
    )
    cluster.add_argument(
        "--broadcast",
        choices=BROADCASTS,
        default="ring",
        help="of the released way: NCCL's ring (default), gloo's tree",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON (bytes, seconds) in place of the tables")
    output.add_argument("--png", type=Path, metavar="FILE", help="also draw who sends what to whom (needs matplotlib)")
    parser.set_defaults(run=run)


def _rows(text: str) -> int | tuple[int, ...]:
    try:
        counts = tuple(int(count) for count in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"rows must be whole numbers, got '{text}'") from None
    return counts if len(counts) > 1 else counts[0]


def _indented(text: str) -> str:
    return "".join(f"  {line}".rstrip() + "\n" for line in text.strip().splitlines())


def edge_of(options: argparse.Namespace) -> Edge:
    """The edge that the options describe. Raises EdgeError."""
    source = parse_layout(options.source, "source")
    destination = parse_layout(options.destination, "destination", max(source.ranks) + 1)
    samples = options.samples
    if samples is None:
        wider = max(len(source.lanes(-1)), len(destination.lanes(0)))
        samples = len(options.rows) if isinstance(options.rows, tuple) else wider
    return Edge(
        source,
        destination,
        samples,
        options.rows,
        options.hidden,
        getattr(torch, options.dtype),
        options.ndim,
        options.batch_dim,
        options.max_chunks,
        path=options.path,
    )


def run(options: argparse.Namespace) -> int:
    """Carry the command out; the exit status."""
    try:
        edge = edge_of(options)
        links = Links(
            nic=options.nic_gbps * 1e9 / 8,
            host=options.nvlink_gbps * 1e9 / 8,
            latency=options.latency_us / 1e6,
            overhead=options.overhead_us / 1e6,
            ranks_per_host=options.ranks_per_host,
        )
        comparisons = compare(edge, links, DIRECTIONS[options.direction], options.broadcast)
        if options.png is not None:
            from .picture import draw

            draw(options.png, edge, comparisons)
    except (ValueError, ImportError, OSError) as error:
        print(f"mimo_ext plan: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report_dict(edge, links, comparisons), indent=2))
    else:
        print(report_text(edge, links, comparisons))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m mimo_ext`."""
    parser = _Parser(prog="mimo_ext", description="Tools of mimo_ext.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    add_to(commands)
    _flight_command.add_to(commands)
    options = parser.parse_args(arguments)
    return int(options.run(options))
