"""The examples of the README and of docs/bridge.md run as printed, and print what they should."""

import contextlib
import io
import re
from pathlib import Path

import torch
import torch.distributed as dist
from launch import launch
from torch import nn

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def run_example(rank: int, world_size: int, code: str) -> str:
    # The ranks have a default group already, and need it afterwards.
    code = code.replace('dist.init_process_group("gloo")', "")
    code = code.replace("dist.destroy_process_group()", "")
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


def losses_of_one_process() -> list[str]:
    """The same model, data and steps without any bridge."""
    torch.manual_seed(0)
    images, targets = torch.randn(4, 8, 16), torch.randn(4, 8, 1)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lines = []
    for step in range(5):
        optimizer.zero_grad()
        loss = (model(images) - targets).square().mean()
        loss.backward()
        optimizer.step()
        lines.append(f"step {step}: loss {loss.detach():.4f}")
    return lines


def test_the_loop_of_the_bridge_page_trains_as_one_process_does() -> None:
    program = (ROOT / "examples/own_loop.py").read_text()
    page = (ROOT / "docs/bridge.md").read_text()
    shown = re.search(r"<!-- examples/own_loop.py -->\n```python\n(.*?)```\n<!-- end -->", page, re.DOTALL).group(1)
    assert program.endswith(shown)
    # torch.optim imports torch._dynamo, which keeps the default group that it finds.
    printed = launch(run_example, 4, program, leaks=True)
    expected = "\n".join(losses_of_one_process())
    assert printed == ["", "", expected, expected]
