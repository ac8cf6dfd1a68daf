"""Can the fuzz targets fail? Each is built with a bug in a copy of the library's source, and must find it in seconds.

    python planted.py --cxx clang++ --flags "..." --build ../../../build/fuzz

Run by `make -C tests/cpp/fuzz planted`, which has built the rest. Exit status 1: a bug was not found, or its place in
the source is gone (then plant another one).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"


@dataclass(frozen=True)
class Bug:
    """One line of the library that is wrong: `right` stands in `source` once, `wrong` takes its place.

    Where both are the same there is no bug, and none may be found.
    """

    name: str
    target: str
    source: str
    right: str
    wrong: str


BUGS = (
    Bug(
        "any number of samples",
        "header",
        "comm/header.cpp",
        'check_range("samples", header.samples, core::kMaxSamples);',
        "",
    ),
    Bug(
        "row counts whose sum overflows",
        "header",
        "comm/header.cpp",
        'check_range("the sum of the row counts", total, kMaxExtent);',
        "",
    ),
    Bug(
        "row counts read beyond the header's end",
        "header",
        "comm/header.cpp",
        "if (!header.has_extension()) {\n    const auto begin",
        "{\n    const auto begin",
    ),
    Bug(
        "a reason that was not made printable",
        "header",
        "comm/header.cpp",
        "return letter < ' ' || letter > '~';",
        "return letter < ' ';",
    ),
    Bug(
        "the last lane that shares samples is forgotten",
        "plan",
        "core/exchange.cpp",
        "other_lanes + lanes - 1) / lanes;",
        "other_lanes) / lanes;",
    ),
    Bug(
        "the last chunk is not delivered",
        "plan",
        "core/exchange.cpp",
        "for (int chunk = 0; chunk < chunks; ++chunk) {",
        "for (int chunk = 0; chunk + 1 < std::max(2, chunks); ++chunk) {",
    ),
    Bug(
        "the sender counts a copy to itself",
        "plan",
        "core/exchange.cpp",
        "if (replica == piece.member || (piece.member",
        "if ((piece.member",
    ),
    Bug(
        "a shard too many",
        "row_shards",
        "core/row_shards.cpp",
        "segment.shard >= num_shards",
        "segment.shard > num_shards",
    ),
    Bug(
        "a sample after the last",
        "row_shards",
        "core/row_shards.cpp",
        "sample >= last_known()) return",
        "sample > last_known()) return",
    ),
    Bug(
        "samples that are not there",
        "row_shards",
        "core/row_shards.cpp",
        "first >= first_known() && last <= last_known()",
        "first >= first_known()",
    ),
)


NOTHING = Bug("nothing at all", "plan", "core/sides.cpp", "namespace mimo_ext::core {", "namespace mimo_ext::core {")


def plant(bug: Bug, build: Path, cxx: str, flags: Sequence[str]) -> Path:
    """The target with the bug. ValueError where its place is gone."""
    text = (CSRC / bug.source).read_text()
    if text.count(bug.right) != 1:
        raise ValueError(f"csrc/{bug.source}: expected {bug.right!r} once, got it {text.count(bug.right)} times")
    stem = build / "planted" / bug.name.replace(" ", "_").replace("'", "")
    stem.parent.mkdir(parents=True, exist_ok=True)
    source, program = stem.with_suffix(".cpp"), stem.with_suffix(".run")
    source.write_text(text.replace(bug.right, bug.wrong))
    changed = build / Path(bug.source).with_suffix(".o")
    # Those of the library alone: its objects lie in folders.
    others = [str(made) for made in sorted(build.glob("*/*.o")) if made != changed and made.parent != stem.parent]
    subprocess.run([cxx, *flags, "-w", f"-I{CSRC}", "-c", str(source), "-o", str(stem.with_suffix(".o"))], check=True)
    parts = [str(build / f"fuzz_{bug.target}.o"), str(stem.with_suffix(".o")), *others]
    subprocess.run([cxx, *flags, *parts, "-o", str(program)], check=True)
    return program


def is_found(bug: Bug, program: Path, seconds: int) -> tuple[bool, float, str]:
    """Whether the fuzzer stops at it, after how long, and the last it says."""
    # Inputs that the fuzzer finds interesting are written into the first folder: one of its own.
    found = program.with_suffix(".corpus")
    found.mkdir(exist_ok=True)
    command = [str(program), "-seed=1", "-timeout=10", "-rss_limit_mb=2048", "-malloc_limit_mb=512", "-max_len=640"]
    command += [f"-max_total_time={seconds}", f"-artifact_prefix={program.with_suffix('')}-"]
    command += [str(found), str(HERE / "corpus" / bug.target)]
    begin = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    stopped = run.returncode != 0 and any(
        words in run.stderr for words in ("libFuzzer: deadly signal", "ERROR: AddressSanitizer", "runtime error:")
    )
    return stopped, time.monotonic() - begin, run.stderr[-3000:]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cxx", required=True)
    parser.add_argument("--flags", required=True, help="of the compiler, as one text")
    parser.add_argument("--build", type=Path, required=True, help="where the library's objects are")
    parser.add_argument("--seconds", type=int, default=20, help="for each bug (default %(default)s)")
    options = parser.parse_args(arguments)

    def check(bug: Bug) -> tuple[Bug, bool, float, str]:
        try:
            program = plant(bug, options.build.resolve(), options.cxx, shlex.split(options.flags))
        except ValueError as error:
            return bug, False, 0.0, str(error)
        return bug, *is_found(bug, program, options.seconds if bug is not NOTHING else 2)

    missed = 0
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        for bug, found, seconds, text in pool.map(check, (*BUGS, NOTHING)):
            right = found == (bug is not NOTHING)
            how = f"found in {seconds:.1f} s" if found else "not found"
            print(f"  planted in {bug.target}: {bug.name}: {how}{'' if right else ': WRONG'}", flush=True)
            if not right:
                missed += 1
                print(text, flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
