"""Builds the native CPU kernels along with the package, where there is a compiler and torch."""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_SPEC = importlib.util.spec_from_file_location("build", Path("fp4graph/kernels/cpu/build.py"))
build = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(build)


class NativeKernels(build_ext):
    """An extension that is no Python module: torch loads it."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file by its sources, as the package looks for it."""
        return str(Path(*fullname.split(".")[:-1], build.library_name()))

    def build_extension(self, ext: Extension) -> None:
        """Compile; without success the package compiles at first use, or does without."""
        try:
            build.compile_library(Path(self.get_ext_fullpath(ext.name)).resolve())
        except build.BuildError as error:
            self.warn(f"fp4graph's native CPU kernels were not built: {error}")


setup(
    ext_modules=[Extension("fp4graph.kernels.cpu.native", sources=[], optional=True)],
    cmdclass={"build_ext": NativeKernels},
)
