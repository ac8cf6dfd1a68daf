"""The C++ program that checks properties, built where needed, and asked case by case."""

from __future__ import annotations

import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
PROGRAM = FOLDER.parents[1] / "build" / "properties" / "check_properties"


def build() -> Path:
    """Path of the up-to-date program."""
    done = subprocess.run(["make", "-C", str(FOLDER), "program"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return PROGRAM


class Checker:
    """Answers "ok", "refused", or the property that does not hold. Ends with its `with` block."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen(
            [str(program), "--stdin"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def __call__(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        answer = self._process.stdout.readline()
        assert answer, f"the program has ended: {line}"
        return answer.rstrip("\n")

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=10)


def regressions() -> list[str]:
    """The cases of regressions.txt."""
    lines = (FOLDER / "regressions.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]
