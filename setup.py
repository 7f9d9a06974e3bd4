"""Builds the native CPU kernels on installing, for every instruction set; all else is in pyproject.toml.

Without a C++ compiler the package is installed without them, and says at the first start what that costs.
"""

import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

NATIVE = Path("distkv/kernels/native")  # in a checkout by a link


class BuildKernels(build_py):
    """Puts the libraries beside their source: in the wheel, or in the tree where that is what is installed."""

    def run(self) -> None:
        super().run()
        source, sets = (runpy.run_path(str(NATIVE / f"{name}.py")) for name in ("build", "instruction_sets"))
        folder = (NATIVE if self.editable_mode else Path(self.build_lib, NATIVE)) / "built"
        shutil.rmtree(folder, ignore_errors=True)  # of another source

        def build(one) -> None:
            name = source["library_name"](one.name, one.flags)
            try:
                source["build"](folder / name, one.flags)
                for suffix in (".lock", ".sha256"):  # for builds side by side; what is installed is not checked
                    (folder / name).with_suffix(suffix).unlink()
            except (source["BuildError"], OSError) as error:
                self.warn(f"the native CPU kernels for {one.name} are not built: {error}")

        with ThreadPoolExecutor() as threads:
            list(threads.map(build, sets["INSTRUCTION_SETS"]))


class PlatformDistribution(Distribution):
    """Of one platform, since it holds libraries."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildKernels}, distclass=PlatformDistribution)
