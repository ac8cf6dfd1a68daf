"""Start the ranks of a layout, and end all of them when one fails or the user presses Ctrl-C."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

ECHO_SECONDS = 2.0  # how much later a rank reports that a peer went away, to let that peer report first
ERROR_FOLDER = "VLM_DIGITS_ERROR_FOLDER"  # where a failing rank leaves its error for the launcher


def quiet() -> None:
    """Silence the advice that Megatron gives on every rank (no Apex, deprecated GPTModel, ...)."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
    warnings.filterwarnings("ignore", category=UserWarning, message="(?s).*experimental and still under")
    warnings.filterwarnings("ignore", category=UserWarning, message="(?s).*autograd kernel was not registered")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def hide_gpus() -> None:
    """Let this process and those it starts run on the CPU also where there are GPUs, which may be fewer than ranks."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def start_ranks(program: Path, arguments: Sequence[str], ranks: int) -> int:
    """Run `program` on `ranks` ranks of this machine, as torchrun does, and return the exit code for the shell.

    The error of the rank that failed first is the last thing written to standard error.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # it says in its own words what we say below
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=3,
    )
    with tempfile.TemporaryDirectory(prefix="vlm_digits_") as folder:
        os.environ[ERROR_FOLDER] = folder
        try:
            elastic_launch(config, sys.executable)("-u", str(program), *arguments)
        except ChildFailedError as error:
            rank, exitcode, text = _first_failure(error, Path(folder))
            print(f"\nrank {rank} failed, so the run has ended:\n{text}", file=sys.stderr, flush=True)
            return exitcode if exitcode > 0 else 1
        except (SignalException, KeyboardInterrupt) as error:
            number = int(getattr(error, "sigval", signal.SIGINT))
            print(f"\nstopped by {signal.Signals(number).name}; all ranks have ended", file=sys.stderr, flush=True)
            return 128 + number
    return 0


def _first_failure(error: object, folder: Path) -> tuple[int, int, str]:
    """Rank, exit code and error text of the failure that caused the others."""
    failures = error.failures  # type: ignore[attr-defined]
    ended_by_us = (0, -signal.SIGTERM, -signal.SIGINT)
    for rank, failure in failures.items():
        # A rank that something killed leaves no report; its peers' reports only say that it went away.
        if failure.exitcode < 0 and failure.exitcode not in ended_by_us:
            name = signal.Signals(-failure.exitcode).name
            return rank, failure.exitcode, f"the process (pid {failure.pid}) was ended by {name}"
    reports = [json.loads(file.read_text()) for file in folder.glob("rank_*.json")]
    if reports:
        first = min(reports, key=lambda report: report["time"])
        return first["rank"], first["exitcode"], first["error"].rstrip()
    rank, failure = error.get_first_failure()  # type: ignore[attr-defined]
    return rank, failure.exitcode, f"exit code {failure.exitcode}; no report"


def _is_echo(error: Exception) -> bool:
    """Whether the error says that a peer went away: then the peer's own error is the one to show."""
    lost = any(words in str(error) for words in ("gloo", "peer", "Connection"))
    return type(error).__name__ in ("BridgeError", "BridgeTimeoutError") or (isinstance(error, RuntimeError) and lost)


def run_rank(main: Callable[[], None]) -> int:
    """Run `main` as one rank: Ctrl-C ends it without a traceback, an error is reported at once and ends the process.

    Returns 0. On an error the process exits with code 1 without waiting for its peers.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        main()
    except Exception as error:
        if _is_echo(error):
            time.sleep(ECHO_SECONDS)
        rank = int(os.environ.get("RANK", "0"))
        text = traceback.format_exc()
        folder = os.environ.get(ERROR_FOLDER)
        if folder and Path(folder).is_dir():
            report = {"rank": rank, "time": time.time(), "exitcode": 1, "error": text}
            partial = Path(folder) / f"rank_{rank}.part"
            partial.write_text(json.dumps(report))
            partial.rename(partial.with_suffix(".json"))
        else:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)  # torchrun shows it at the end
            print(f"rank {rank} failed:\n{text}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # destructors of process groups would wait for ranks that will never answer
    return 0
