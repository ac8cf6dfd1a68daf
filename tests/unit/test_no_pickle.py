"""Nothing that comes from a peer is unpickled or run: the package has no way to do so."""

from __future__ import annotations

import ast
from pathlib import Path

import mimo_ext

# Whatever unpickles, by the name that it is called by. torch's object collectives unpickle what the peers send.
FORBIDDEN = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
    "Unpickler",
    "eval",
    "exec",
}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found += sorted(names & (FORBIDDEN | FORBIDDEN_MODULES))
            if node.module is not None and node.module.split(".")[0] in FORBIDDEN_MODULES:
                found.append(node.module)
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN - {"eval"}:  # Module.eval() is harmless
            found.append(node.attr)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "torch.load"
            and "weights_only=True" not in [ast.unparse(keyword) for keyword in node.keywords]
        ):
            found.append("torch.load")
        elif isinstance(node, ast.keyword) and ast.unparse(node) == "weights_only=False":
            found.append("weights_only=False")
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN:
            found.append(node.id)
    return found


def test_the_package_does_not_unpickle() -> None:
    folder = Path(mimo_ext.__file__).parent
    files = sorted(folder.rglob("*.py"))
    assert len(files) > 30
    assert {str(file.relative_to(folder)): found for file in files if (found := offences(file.read_text()))} == {}


def test_examples_benchmarks_and_tests_unpickle_nothing_from_peers_and_files() -> None:
    root = Path(__file__).parents[2]
    files = [
        file for folder in ("examples", "benchmarks", "scripts", "tests") for file in (root / folder).rglob("*.py")
    ]
    assert len(files) > 100
    # launch.py reads what its own children write into pipes that nobody else has; tests run code of their own.
    harmless = {"eval", "exec", "Unpickler", *FORBIDDEN_MODULES, "loads", "dumps"}
    found = {file.name: sorted(set(offences(file.read_text())) - harmless) for file in files}
    assert {name: offence for name, offence in found.items() if offence} == {}


def test_what_unpickles_is_noticed() -> None:
    for line in (
        "import pickle",
        "from pickle import loads",
        "import torch.distributed as dist\ndist.all_gather_object(found, mine)",
        "from torch.distributed import broadcast_object_list",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import torch\nload = torch.load\nload('x', map_location='cpu', weights_only=False)",
        "exec('1')",
    ):
        assert offences(line), line
    assert offences("model.eval()\nimport json\ntorch.load('x', weights_only=True)") == []


def test_the_extension_does_not_unpickle() -> None:
    sources = Path(__file__).parents[2] / "csrc"
    files = [file for ending in ("*.cpp", "*.h", "*.cu") for file in sorted(sources.rglob(ending))]
    assert len(files) > 30
    words = ("pickle", "torch/serialize", "PyRun_", "py::exec", "py::eval", "PyMarshal")
    assert [(file.name, word) for file in files for word in words if word.lower() in file.read_text().lower()] == []
