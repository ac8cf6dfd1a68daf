"""Which of a sanitizer's reports are ours, and that the program it watches is right without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from run import main, reports

RACE = """\
WARNING: ThreadSanitizer: data race (pid=7)
  Write of size 8 at 0x7b04 by thread T3 (mutexes: write M1):
    #0 mimo_ext::comm::Channel::send /src/csrc/comm/{file}:88 (_C.so+0x1)
  Previous read of size 8 at 0x7b04 by thread T4:
    #0 std::thread::_State /usr/include/c++/12/bits/std_thread.h:210
==================
"""
LEAK = "Direct leak of 64 byte(s) in 1 object(s) allocated from:\n    #0 operator new\n    #1 {where}\n\n"


def test_reports_that_name_a_source_of_ours_are_found() -> None:
    log = "4 passed\n" + RACE.format(file="channel_send.cpp") + RACE.format(file="flight.h")
    assert [report.count("ThreadSanitizer") for report in reports(log)] == [1, 1]
    heap = "==12==ERROR: AddressSanitizer: heap-buffer-overflow\n    #0 pack /src/csrc/ops/pack.cpp:12\n"
    overflow = "/src/csrc/core/plan.cpp:7:3: runtime error: signed integer overflow\n"
    found = reports("noise\n" + heap + overflow + LEAK.format(where="make /src/csrc/bindings/comm_py.cpp:40"))
    assert [report.splitlines()[0] for report in found] == [
        "==12==ERROR: AddressSanitizer: heap-buffer-overflow",
        "/src/csrc/core/plan.cpp:7:3: runtime error: signed integer overflow",
        "Direct leak of 64 byte(s) in 1 object(s) allocated from:",
    ]


def test_reports_of_python_and_torch_are_not_ours() -> None:
    leak = LEAK.format(where="_PyObject_Malloc /python/Objects/obmalloc.c:712")
    race = RACE.replace("/src/csrc/comm/{file}:88", "/pytorch/torch/csrc/distributed/c10d/Store.cpp:9")
    # A leak of theirs that stands before one of ours does not hide it.
    assert reports(leak + race) == []
    (mine,) = reports(leak + LEAK.format(where="csrc/comm/worker.cpp:3") + leak)
    assert mine.count("Direct leak") == 1


def test_a_folder_without_a_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["thread", str(tmp_path)])
    assert ended.value.code in (2, 77)


def test_ranks_as_threads_get_the_right_values() -> None:
    program = Path(__file__).with_name("thread_ranks.py")
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert run.stdout.count(": done") == 14
