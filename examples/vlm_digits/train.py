#!/usr/bin/env python3
"""Train a small vision-language model to read handwritten numbers, with its two modules in different parallel layouts.

    python examples/vlm_digits/train.py
    python examples/vlm_digits/train.py --layout "images: tp=2,dp=2; language: dp=2,pp=2"
    torchrun --nproc-per-node 4 examples/vlm_digits/train.py --layout "images: dp=2; language: tp=2"
    python examples/vlm_digits/train.py --layout "images: ranks=0-3,tp=2,dp=2; language: ranks=0-3,dp=4"
    python examples/vlm_digits/train.py --device cuda
    python examples/vlm_digits/train.py --check

Run by itself it starts the ranks that the layout needs, all on this machine; under torchrun it is one of the ranks.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the files beside it are a package, not modules of their own
    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(path for path in sys.path if Path(path).resolve() != _here)]

from vlm_digits.launch import hide_gpus, quiet, run_rank, start_ranks
from vlm_digits.layout import DEFAULT_LAYOUT, LayoutError, VlmLayout, check_batch, check_world, parse_layout

USUAL_BATCH = 32


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--layout",
        default=DEFAULT_LAYOUT,
        help="sizes of each module: tp (tensor), dp (data), pp (pipeline). Its ranks follow those of the module before "
        "it; ranks=FIRST-LAST names them instead, and both modules may have the same ranks (default: '%(default)s')",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the data split, the data order and the weights")
    parser.add_argument("--steps", type=int, default=800, help="updates of the weights (default: %(default)s)")
    parser.add_argument(
        "--batch",
        type=int,
        help=f"numbers per step in all (default: {USUAL_BATCH}, or the next that splits evenly)",
    )
    parser.add_argument("--microbatches", type=int, default=2, help="parts of a batch (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument(
        "--picture", type=Path, default=Path("out/vlm_digits.png"), help="PNG to draw (default: %(default)s)"
    )
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="PNG to draw of one step: what every rank computes, transfers and waits for; with .json in place of .png, "
        "the same for chrome://tracing. For modules on ranks of their own",
    )
    parser.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let transfers between modules on ranks of their own run while the ranks compute (default: yes)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what the ranks compute on; several of them may share a GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--transport",
        choices=("gloo", "staged", "groups"),
        help="what carries the tensors between the modules (default: gloo for the CPU, staged for CUDA)",
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for a peer (default: %(default)s)")
    parser.add_argument(
        "--check",
        nargs="?",
        choices=("matrix", "disjoint", "colocated"),
        const="matrix",
        help="instead of training: compare the first steps with one process without parallelism, for the layouts, "
        "precisions and ways to run of matrix.py (the default), or more steps in fp32 for a few layouts in which each "
        "module has ranks of its own (disjoint) or both have the same (colocated)",
    )
    return parser.parse_args(arguments)


def usual_batch(layout: VlmLayout, microbatches: int) -> int:
    """The smallest batch of 32 or more that gives every lane of every module the same number of samples."""
    unit = microbatches * math.lcm(*(module.dp for module in layout.modules.values()))
    return -(-USUAL_BATCH // unit) * unit


def check_device(options: argparse.Namespace) -> None:
    """Raises LayoutError for a device that is not there, and a transport that does not go with it."""
    if options.device == "cpu":
        return
    if options.check:
        raise LayoutError("--check compares on the CPU: expected --device cpu")
    if options.transport not in (None, "staged"):
        raise LayoutError(f"--transport {options.transport} carries tensors of the CPU: expected staged")
    import torch

    import mimo_ext

    if not torch.cuda.is_available():
        raise LayoutError("--device cuda: torch finds no CUDA device here; leave --device out to train on the CPU")
    if not mimo_ext.has_cuda():
        raise LayoutError("--device cuda: mimo_ext was built without its CUDA kernels; build it with MIMO_EXT_CUDA=1")


def main(arguments: list[str] | None = None) -> int:
    """The program; returns the exit code for the shell."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    is_rank = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    try:
        if options.steps < 1 or options.microbatches < 1:
            raise LayoutError("--steps and --microbatches must be 1 or more")
        layout = parse_layout(options.layout)
        batch = usual_batch(layout, options.microbatches) if options.batch is None else options.batch
        check_batch(layout, batch, options.microbatches)
        if options.timeline is not None and layout.colocated:
            raise LayoutError("--timeline shows the pipeline between modules on ranks of their own")
        check_device(options)
        if is_rank:
            check_world(layout, int(os.environ["WORLD_SIZE"]))
    except LayoutError as error:
        if is_rank and os.environ["RANK"] != "0":
            time.sleep(3)  # torchrun ends all ranks as soon as one does: rank 0 speaks first
        else:
            print(f"this cannot work (--layout '{options.layout}'): {error}", file=sys.stderr)
        return 2
    quiet()
    if options.device == "cpu":
        hide_gpus()
    if options.check:
        from vlm_digits.check import COLOCATED_LAYOUTS, LAYOUTS, check_layouts, check_matrix

        try:
            if options.check == "matrix":
                return check_matrix(options.seed)
            return check_layouts(options.seed, COLOCATED_LAYOUTS if options.check == "colocated" else LAYOUTS)
        except KeyboardInterrupt:
            print("\nstopped by SIGINT; all ranks have ended", file=sys.stderr)
            return 130
    if not is_rank:
        return start_ranks(Path(__file__).resolve(), arguments, layout.world_size)

    def train() -> None:
        from vlm_digits.run import train_rank
        from vlm_digits.trainer import Recipe

        recipe = Recipe(
            seed=options.seed,
            steps=options.steps,
            batch=batch,
            microbatches=options.microbatches,
            lr=options.lr,
            warmup=min(100, options.steps // 8),
        )
        train_rank(
            layout,
            recipe,
            options.picture,
            options.timeout,
            options.timeline,
            options.overlap,
            options.device,
            options.transport,
        )

    return run_rank(train)


if __name__ == "__main__":
    sys.exit(main())
