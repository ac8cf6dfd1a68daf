"""The extension in Python under AddressSanitizer and UBSan, and under ThreadSanitizer: `make check-sanitize`.

    python tests/sanitize/run.py address build/address/lib
    python tests/sanitize/run.py thread build/thread/lib

The folder holds a build with MIMO_EXT_SANITIZE. Python and torch are not instrumented: reports that name none of our
sources are not ours (CPython never frees what it keeps). Exit status: 0 nothing of ours was reported, 1 something was
or a program failed, 77 this compiler has no such sanitizer.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    "address": {
        "ASAN_OPTIONS": "detect_leaks=1:halt_on_error=0:exitcode=0:detect_odr_violation=0",
        "LSAN_OPTIONS": "exitcode=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    # gloo and Python are not instrumented: what they do in between is invisible, and no reason for a report.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:exitcode=0:halt_on_error=0:second_deadlock_stack=1"},
}
PROGRAMS = {
    "ranks as threads": [str(HERE / "thread_ranks.py")],
    "ops": [
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"),
        *(str(TESTS / "unit" / f"test_{name}.py") for name in ("ops_pack", "ops_pack_contract", "ops_rescale")),
    ],
}
OURS = re.compile(r"csrc/(core|ops|comm|bindings)/\w+\.(cpp|h):\d+")
BEGIN = re.compile(
    r"^(==\d+==\s*ERROR: |WARNING: ThreadSanitizer: |(Direct|Indirect) leak of |\S+: runtime error: )", re.MULTILINE
)


def split(log: str) -> list[str]:
    """The reports of a sanitizer's log."""
    begins = [match.start() for match in BEGIN.finditer(log)]
    return [log[begin:end] for begin, end in zip(begins, [*begins, len(log)][1:], strict=True)]


def reports(log: str) -> list[str]:
    """Those that name a source of ours."""
    return [report for report in split(log) if OURS.search(report)]


def library(name: str) -> str | None:
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    return path if os.path.isabs(path) else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sanitizer", choices=LIBRARIES)
    parser.add_argument("folder", type=Path, help="that holds the sanitized mimo_ext")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each program (default %(default)g)")
    options = parser.parse_args(arguments)
    preloaded = [library(name) for name in LIBRARIES[options.sanitizer]]
    if None in preloaded:
        print(f"skipped: the compiler has no {' and '.join(LIBRARIES[options.sanitizer])}", file=sys.stderr)
        return 77
    if not list((options.folder / "mimo_ext").glob("_C*.so")):
        parser.error(f"expected a build of mimo_ext in {options.folder}")
    environment = {
        **os.environ,
        **OPTIONS[options.sanitizer],
        "LD_PRELOAD": ":".join(filter(None, preloaded)),
        "PYTHONPATH": os.pathsep.join([str(options.folder.resolve()), str(TESTS)]),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    if not sees_faults(options.sanitizer, environment):
        return 1
    wrong = 0
    for name, command in PROGRAMS.items():
        wrong += not passes(name, [sys.executable, "-W", "ignore", *command], environment, options)
    return 1 if wrong else 0


def sees_faults(sanitizer: str, environment: dict[str, str]) -> bool:
    """Whether faults that are there are reported: without that, silence means nothing."""
    flags = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}
    calls = {"address": ("overflow(2**31 - 1)", "after_free(1)"), "thread": ("race(100000)",)}
    with tempfile.TemporaryDirectory() as folder:
        faulty = f"{folder}/faulty.so"
        compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-g", "-shared", "-fPIC", flags[sanitizer]]
        subprocess.run([*compiler, str(HERE / "faulty.cpp"), "-o", faulty], check=True)
        for call in calls[sanitizer]:
            program = f"import ctypes; ctypes.CDLL({faulty!r}).{call}"
            run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
            if not any("faulty.cpp" in part for part in split(run.stderr)):
                print(f"{sanitizer}: a fault that is there was not reported: {call}\n{run.stderr[-2000:]}")
                return False
    return True


def passes(name: str, command: list[str], environment: dict[str, str], options: argparse.Namespace) -> bool:
    with tempfile.TemporaryFile("w+", errors="replace") as file, tempfile.TemporaryDirectory() as folder:
        try:
            status: int | str = subprocess.run(
                command, env=environment, cwd=folder, stdout=file, stderr=file, timeout=options.timeout
            ).returncode
        except subprocess.TimeoutExpired:
            status = "timeout"
        file.seek(0)
        log = file.read()
    found = reports(log)
    all_reports = len(BEGIN.findall(log))
    print(f"{options.sanitizer}, {name}: status {status}; {len(found)} reports of ours, of {all_reports}", flush=True)
    if status != 0:
        print(log[-4000:])
    print("\n".join(found[:10]))
    return status == 0 and not found


if __name__ == "__main__":
    sys.exit(main())
