"""Drives CMake for the compiled kernels. They are optional: without a compiler the package installs and runs, only slower."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds the CMake target named like the extension, into the place where setuptools expects the extension."""

    def build_extension(self, ext: Extension) -> None:
        target = ext.name.rpartition(".")[2]
        try:
            self.cmake(target, Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            cause = "CMake failed" if isinstance(error, subprocess.CalledProcessError) else error
            print(
                f"\nseal-fast: {ext.name} was not built ({cause}).\n"
                "seal-fast: the package works without it, on the slower PyTorch reference. "
                "To build it, install a C++17 compiler (and nvcc for CUDA) and install again; the cause is printed above.\n",
                file=sys.stderr,
            )

    def cmake(self, target: str, output: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        # cmake and ninja installed as Python packages lie beside the interpreter, which need not be on PATH
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        env = {**os.environ, "PATH": path}
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            raise FileNotFoundError("cmake is not installed")
        generator = ["-G", "Ninja"] if shutil.which("ninja", path=path) else []
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(output),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *generator, *defines], check=True, env=env)
        subprocess.run([cmake, "--build", str(build), "--target", target, "--parallel"], check=True, env=env)


names = ["seal_fast._native", *(["seal_fast._native_cuda"] if shutil.which("nvcc") else [])]

setup(
    packages=[*find_packages(include=["seal_fast", "seal_fast.*"]), "seal_fast.kernels"],
    package_dir={"seal_fast.kernels": "kernels"},
    ext_modules=[Extension(name, sources=[], optional=True) for name in names],
    cmdclass={"build_ext": CMakeBuild},
)
