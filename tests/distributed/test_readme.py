"""The README's example runs as printed and prints what its comments say."""

import contextlib
import io
import re
from pathlib import Path

import torch.distributed as dist
from launch import launch

README = Path(__file__).parents[2] / "README.md"


def run_example(rank: int, world_size: int, code: str) -> str:
    # The ranks have a default group already.
    code = code.replace('dist.init_process_group("gloo")', "")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(README), "exec"), {"__name__": "__main__"})
    dist.barrier()
    return printed.getvalue().strip()


def test_the_readme_example():
    code = re.search(r"```python\n(import torch\n.*?)```", README.read_text(), re.DOTALL).group(1)
    assert code in (README.parent / "examples/quickstart.py").read_text()
    sources = re.search(r"# rank 0: (tensor\(.*?\)) +rank 1: (tensor\(.*?\))\n", code)
    destination = re.search(r"print\(y.*# (tensor\(.*\))\n", code)
    printed = launch(run_example, 4, code)
    assert printed == [sources.group(1), sources.group(2), destination.group(1), destination.group(1)]
