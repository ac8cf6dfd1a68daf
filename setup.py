"""Build of the extension `mimo_ext._C`.

Environment:
    MIMO_EXT_CUDA=auto|0|1   CUDA kernels. auto (default): when torch is a CUDA build and its toolkit is found. 1: also
                             beside a CPU build of torch; fails without a toolkit, or with one that torch does not fit.
    MIMO_EXT_CUDA_ARCHS      compute capabilities, semicolons between them; default "80;90;100".
    CUDA_HOME                the toolkit: the folder that holds bin/nvcc; default /usr/local/cuda.
    MIMO_EXT_SANITIZE        thread or address,undefined: a build for `make check-sanitize`; the sanitizer's library
                             must be preloaded.
    MIMO_EXT_WERROR=1        warnings of our own sources are errors (CI).
    MAX_JOBS                 parallel compilations (a c10d source needs about 0.8 GB).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError:
    sys.exit(
        "mimo_ext is built against the torch that it will run with, and no torch is installed here.\n"
        "Install torch (>= 2.11), then run:\n    pip install --no-build-isolation ."
    )

SOURCES = [
    "csrc/core/layout.cpp",
    "csrc/core/exchange.cpp",
    "csrc/core/microbatch.cpp",
    "csrc/core/paths.cpp",
    "csrc/core/pieces.cpp",
    "csrc/core/plan.cpp",
    "csrc/core/plan_text.cpp",
    "csrc/core/row_shards.cpp",
    "csrc/core/sides.cpp",
    "csrc/core/stages.cpp",
    "csrc/ops/pack.cpp",
    "csrc/ops/rescale.cpp",
    "csrc/ops/cpu/pack_kernel.cpp",
    "csrc/ops/cpu/rescale_kernel.cpp",
    "csrc/ops/cpu/vector_kernels.cpp",
    "csrc/ops/cpu/vector_kernels_baseline.cpp",
    "csrc/ops/cpu/vector_kernels_avx2.cpp",
    "csrc/ops/cpu/vector_kernels_avx512.cpp",
    "csrc/comm/errors.cpp",
    "csrc/comm/flight.cpp",
    "csrc/comm/fork.cpp",
    "csrc/comm/header.cpp",
    "csrc/comm/last_words.cpp",
    "csrc/comm/leftovers.cpp",
    "csrc/comm/c10d_transport.cpp",
    "csrc/comm/group_transport.cpp",
    "csrc/comm/grouped_backend.cpp",
    "csrc/comm/program.cpp",
    "csrc/comm/rounds.cpp",
    "csrc/comm/staging.cpp",
    "csrc/comm/transfers.cpp",
    "csrc/comm/waiter.cpp",
    "csrc/comm/worker.cpp",
    "csrc/comm/channel.cpp",
    "csrc/comm/channel_ahead.cpp",
    "csrc/comm/channel_headers.cpp",
    "csrc/comm/channel_receive.cpp",
    "csrc/comm/channel_rounds.cpp",
    "csrc/comm/channel_send.cpp",
    "csrc/comm/channel_staged.cpp",
    "csrc/comm/channel_turns.cpp",
    "csrc/comm/config.cpp",
    "csrc/comm/communicator.cpp",
    "csrc/comm/communicator_end.cpp",
    "csrc/bindings/core_py.cpp",
    "csrc/bindings/comm_py.cpp",
    "csrc/bindings/ops.cpp",
    "csrc/bindings/row_shards_py.cpp",
    "csrc/bindings/module.cpp",
]
# With CUDA kernels: their torch side, and the kernels themselves, which include no torch header.
CUDA_GLUE = [
    "csrc/ops/cuda/box_table.cpp",
    "csrc/ops/cuda/rescale_table.cpp",
    "csrc/ops/cuda/pack_cuda.cpp",
    "csrc/ops/cuda/rescale_cuda.cpp",
]
CUDA_SOURCES = ["csrc/ops/cuda/convert.cu", "csrc/ops/cuda/pack.cu", "csrc/ops/cuda/rescale.cu"]
WERROR = ["-Werror"] if os.environ.get("MIMO_EXT_WERROR") == "1" else []
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion"]


def cuda_home() -> Path | None:
    """CUDA_HOME, else /usr/local/cuda. Not the nvcc of PATH: it may be a wrapper script outside the toolkit."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return home if (home / "bin/nvcc").exists() else None


def toolkit_version(home: Path) -> str:
    """Such as "13.0", as nvcc says it."""
    text = subprocess.run([str(home / "bin/nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        sys.exit(f"{home}/bin/nvcc --version: expected a line with a release, got:\n{text}")
    return found[1]


def want_cuda(home: Path | None) -> bool:
    mode = os.environ.get("MIMO_EXT_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"MIMO_EXT_CUDA must be auto, 0 or 1, got {mode!r}")
    if mode == "0" or (mode == "auto" and (home is None or torch.version.cuda is None)):
        return False
    if home is None:
        where = "CUDA_HOME={CUDA_HOME} holds no bin/nvcc".format(**os.environ) if "CUDA_HOME" in os.environ else ""
        sys.exit(
            f"MIMO_EXT_CUDA=1, but no CUDA toolkit was found ({where or 'no /usr/local/cuda/bin/nvcc'}): "
            "set CUDA_HOME to the folder that holds bin/nvcc"
        )
    version = toolkit_version(home)
    # Both use one CUDA runtime library, and its name holds the major version.
    if torch.version.cuda is not None and torch.version.cuda.split(".")[0] != version.split(".")[0]:
        message = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, the toolkit in {home} is {version}"
        )
        if mode == "1":
            sys.exit(f"MIMO_EXT_CUDA=1, but {message}: expected the same major version")
        print(f"mimo_ext: {message}: no CUDA kernels")
        return False
    return True


CUDA = cuda_home()
USE_CUDA = want_cuda(CUDA)
ARCHS = os.environ.get("MIMO_EXT_CUDA_ARCHS", "80;90;100").split(";")


class Build(BuildExtension):
    """The .cu files include no torch header: nvcc builds them by itself, beside any torch (also a CPU build)."""

    def build_extensions(self) -> None:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            sys.exit("mimo_ext needs a C++20 compiler (g++ 11 or later): none was found. Debian: apt-get install g++")
        if USE_CUDA:
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(jobs) as pool:
                objects = list(pool.map(self.compile_cuda, map(Path, CUDA_SOURCES)))
            self.extensions[0].extra_objects += objects
        super().build_extensions()

    def compile_cuda(self, source: Path) -> str:
        assert CUDA is not None
        out = Path(self.build_temp) / source.with_suffix(f".sm_{'_'.join(ARCHS)}.o")
        inputs = [source, Path(__file__), *Path("csrc/ops").rglob("*.h")]
        if out.exists() and out.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
            return str(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        codes.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
        errors = ["-Werror", "all-warnings"] if WERROR else []
        nvcc = [str(CUDA / "bin/nvcc"), "-std=c++20", "-O3", "-Icsrc", "-c", str(source), "-o", str(out), *errors]
        subprocess.check_call([*nvcc, "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", *codes])
        return str(out)


# -isystem beats -I for the same folder: only warnings of our own sources are seen.
SYSTEM = [flag for path in [*include_paths(), sysconfig.get_paths()["include"]] for flag in ("-isystem", path)]
SANITIZE = os.environ.get("MIMO_EXT_SANITIZE")
# UBSan goes on after a report: the log tells all of them.
SANITIZER = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer"] if SANITIZE else []
# Without telemetry only benchmarks are built: they measure what it costs.
TELEMETRY = [("MIMO_EXT_TELEMETRY", "0")] if os.environ.get("MIMO_EXT_TELEMETRY") == "0" else []
OPTIMIZE = ["-O1", "-g", *SANITIZER] if SANITIZE else ["-O3", "-g0"]
CUDA_LINK = []
if USE_CUDA and CUDA is not None:
    CUDA_LINK = [f"-L{CUDA / 'lib64'}", "-lcudart"]
    if torch.version.cuda is None:  # a CUDA build of torch has loaded its own CUDA runtime
        CUDA_LINK.append(f"-Wl,-rpath,{CUDA / 'lib64'}")
print(f"mimo_ext: torch {torch.__version__}; CUDA kernels: {'sm_' + ', sm_'.join(ARCHS) if USE_CUDA else 'off'}")

setup(
    ext_modules=[
        CppExtension(
            "mimo_ext._C",
            SOURCES + (CUDA_GLUE if USE_CUDA else []),
            include_dirs=[str(Path("csrc").resolve())],
            define_macros=[("MIMO_EXT_TORCH_VERSION", f'"{torch.__version__}"'), *TELEMETRY],
            # c++20 is given explicitly: torch 2.11 would append c++17.
            extra_compile_args={
                "cxx": ["-std=c++20", *OPTIMIZE, "-fvisibility=hidden", "-fopenmp", *WARNINGS, *WERROR, *SYSTEM]
            },
            # Without -fopenmp at::parallel_for is serial in our sources; torch has the same libgomp loaded.
            extra_link_args=["-fopenmp", *SANITIZER, *CUDA_LINK],
        )
    ],
    cmdclass={"build_ext": Build},
)
