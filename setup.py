"""Build of the extension `mimo_ext._C`.

Environment:
    MIMO_EXT_CUDA=auto|0|1   CUDA kernels. auto: when torch is a CUDA build and a toolkit is found; 1 fails without a
    toolkit. MIMO_EXT_WERROR=1        warnings of our own sources are errors (CI). MIMO_EXT_CUDA_ARCHS      semicolon
    list, default "80;90;100". MAX_JOBS                 parallel compilations (a c10d source needs about 0.8 GB).
    MIMO_EXT_SANITIZE=thread or address,undefined: a build for `make check-sanitize`; the sanitizer's library must be
    preloaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
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
    "csrc/comm/header.cpp",
    "csrc/comm/leftovers.cpp",
    "csrc/comm/c10d_transport.cpp",
    "csrc/comm/program.cpp",
    "csrc/comm/waiter.cpp",
    "csrc/comm/worker.cpp",
    "csrc/comm/channel.cpp",
    "csrc/comm/channel_headers.cpp",
    "csrc/comm/channel_receive.cpp",
    "csrc/comm/channel_send.cpp",
    "csrc/comm/config.cpp",
    "csrc/comm/communicator.cpp",
    "csrc/bindings/core_py.cpp",
    "csrc/bindings/comm_py.cpp",
    "csrc/bindings/ops.cpp",
    "csrc/bindings/row_shards_py.cpp",
    "csrc/bindings/module.cpp",
]
CUDA_SOURCES: list[str] = []  # torch-free .cu files; none yet
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion"]


def cuda_home() -> Path | None:
    """CUDA_HOME, else /usr/local/cuda. Not the nvcc of PATH: it may be a wrapper script outside the toolkit."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return home if (home / "bin/nvcc").exists() else None


def want_cuda(home: Path | None) -> bool:
    mode = os.environ.get("MIMO_EXT_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"MIMO_EXT_CUDA must be auto, 0 or 1, got {mode!r}")
    if mode == "1" and home is None:
        sys.exit("MIMO_EXT_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME to the folder that holds bin/nvcc")
    return mode == "1" or (mode == "auto" and home is not None and torch.version.cuda is not None)


CUDA = cuda_home()
USE_CUDA = want_cuda(CUDA) and bool(CUDA_SOURCES)
ARCHS = os.environ.get("MIMO_EXT_CUDA_ARCHS", "80;90;100").split(";")


class Build(BuildExtension):
    """The .cu files include no torch header: nvcc builds them by itself, beside any torch (also a CPU build)."""

    def build_extensions(self) -> None:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            sys.exit("mimo_ext needs a C++20 compiler (g++ 11 or later): none was found. Debian: apt-get install g++")
        if USE_CUDA:
            for source in CUDA_SOURCES:
                self.extensions[0].extra_objects.append(self.compile_cuda(Path(source)))
        super().build_extensions()

    def compile_cuda(self, source: Path) -> str:
        out = Path(self.build_temp) / source.with_suffix(".cu.o")
        out.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        codes.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
        nvcc = [str(CUDA / "bin/nvcc"), "-std=c++20", "-O3", "-Icsrc", "-c", str(source), "-o", str(out)]
        subprocess.check_call([*nvcc, "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", *codes])
        return str(out)


# -isystem beats -I for the same folder: only warnings of our own sources are seen.
SYSTEM = [flag for path in [*include_paths(), sysconfig.get_paths()["include"]] for flag in ("-isystem", path)]
WERROR = ["-Werror"] if os.environ.get("MIMO_EXT_WERROR") == "1" else []
SANITIZE = os.environ.get("MIMO_EXT_SANITIZE")
# UBSan goes on after a report: the log tells all of them.
SANITIZER = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer"] if SANITIZE else []
OPTIMIZE = ["-O1", "-g", *SANITIZER] if SANITIZE else ["-O3", "-g0"]
print(f"mimo_ext: torch {torch.__version__}; CUDA kernels: {'sm_' + ', sm_'.join(ARCHS) if USE_CUDA else 'off'}")

setup(
    ext_modules=[
        CppExtension(
            "mimo_ext._C",
            SOURCES,
            include_dirs=[str(Path("csrc").resolve())],
            define_macros=[("MIMO_EXT_TORCH_VERSION", f'"{torch.__version__}"')]
            + ([("MIMO_EXT_WITH_CUDA", "1")] if USE_CUDA else []),
            # c++20 is given explicitly: torch 2.11 would append c++17.
            extra_compile_args={
                "cxx": ["-std=c++20", *OPTIMIZE, "-fvisibility=hidden", "-fopenmp", *WARNINGS, *WERROR, *SYSTEM]
            },
            # Without -fopenmp at::parallel_for is serial in our sources; torch has the same libgomp loaded.
            extra_link_args=[
                "-fopenmp",
                *SANITIZER,
                *([f"-L{CUDA / 'lib64'}", "-lcudart"] if USE_CUDA and CUDA else []),
            ],
        )
    ],
    cmdclass={"build_ext": Build},
)
