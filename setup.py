"""Builds csrc/ into src/paley/kernels, one shared library for ctypes; pyproject.toml has everything else.

No Python header is used, so one file serves every Python. Without a C++ compiler the package installs all the same,
and the kernels' torch reference runs.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
NAME = "libpaley" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")  # as in paley/kernels/native.py
# No -march=native: each file names its instruction set, and the library picks among them when it runs.
# NaN and infinities keep their meaning; only errno and floating-point traps, which nobody reads, are given up.
UNIX_FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-pthread",
    "-ffp-contract=off",  # a sum is fused where the code says so: results are the same on every machine
    "-Wno-maybe-uninitialized",  # false alarms in gcc 12's own AVX-512 header
    "-Wno-psabi",  # vectors of 32 bytes, which no function of another file takes
]  # fmt: skip
WINDOWS_FLAGS = ["/std:c++17", "/O2", "/EHsc", "/clang:-ffp-contract=off"]  # as clang-cl reads them

FIRST = ("matmul", "nearest", "columns", "planes", "steps")  # these take the compiler longest


def started_at(source: str) -> int:
    kind = Path(source).stem.split("_")[0]
    return FIRST.index(kind) if kind in FIRST else len(FIRST)


class BuildKernels(build_ext):
    """A plain shared library: no PyInit function, no Python version in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], NAME))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols

    def run(self) -> None:
        if self.inplace:  # a library that this build fails to renew must not be taken for the new one
            Path("src", self.get_ext_filename(kernels.name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        windows = self.compiler.compiler_type == "msvc"
        ext.extra_compile_args = WINDOWS_FLAGS if windows else UNIX_FLAGS
        ext.extra_link_args = [] if windows else ["-pthread"]
        self.mkpath(str(Path(self.build_temp, "csrc")))
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources: list[str], **options: object) -> list[str]:
            """Objects of `sources`, in their order: one compiler a core, the longest sources first."""
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = {s: pool.submit(compile_in_turn, [s], **options) for s in sorted(sources, key=started_at)}
            return [name for source in sources for name in objects[source].result()]

        self.compiler.compile = compile_at_once
        super().build_extension(ext)


class Wheel(bdist_wheel):
    """One wheel for every Python of a platform; for every platform where there was no compiler."""

    def get_tag(self) -> tuple[str, str, str]:
        built = Path(self.bdist_dir, "paley", "kernels", NAME)
        platform = super().get_tag()[2] if built.is_file() else "any"
        return "py3", "none", platform


kernels = Extension("paley.kernels.libpaley", SOURCES, depends=HEADERS, language="c++", optional=True)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel})
