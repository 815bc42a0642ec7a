"""Builds vilt_fast, with its native module _C if a C++ compiler is at hand.

Environment:
    VILT_FAST_CUDA=auto|0|1     CUDA kernels: auto builds them when nvcc is there and works, 1 insists, 0 omits them
    VILT_FAST_CUDA_ARCHS="90"   only for these GPUs (compute capability 9.0); default: 8.x, 9.0, 10.0 and newer
    VILT_FAST_SANITIZE=0|1      1: under AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`)
    MAX_JOBS=<n>                parallel compile jobs
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def compiler() -> str | None:
    """The C++ compiler CMake would pick, or None."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def cuda_wanted() -> bool:
    mode = os.environ.get("VILT_FAST_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"VILT_FAST_CUDA is {mode!r}; expected auto, 0 or 1")
    if mode == "1" and not nvcc():
        raise SystemExit("VILT_FAST_CUDA=1, but nvcc was not found")
    return mode != "0" and nvcc() is not None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cuda = cuda_wanted()
        try:
            self.build(ext, cuda)
        except subprocess.CalledProcessError:
            if not cuda or os.environ.get("VILT_FAST_CUDA") == "1":
                raise
            notice = "the CUDA kernels did not build (see above; VILT_FAST_CUDA=1 insists): building without them."
            print(f"vilt_fast: NOTICE: {notice}", file=sys.stderr)
            self.build(ext, cuda=False)

    def build(self, ext: Extension, cuda: bool) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVILT_FAST_CUDA={'ON' if cuda else 'OFF'}",
            f"-DVILT_FAST_CUDA_ARCHS={os.environ.get('VILT_FAST_CUDA_ARCHS', '')}",
            f"-DVILT_FAST_SANITIZE={os.environ.get('VILT_FAST_SANITIZE', '0')}",
        ]
        if cuda:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc()}")
        if ninja := shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent)):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)


native = compiler() is not None
if not native:
    print(
        "vilt_fast: NOTICE: no C++ compiler found (install g++ or clang++, or set CXX): installing without the native\n"
        "CPU kernels. Everything works through PyTorch, more slowly; `vilt-fast info` shows what is missing.",
        file=sys.stderr,
    )

setup(
    packages=[*find_packages(include=["vilt_fast", "vilt_fast.*"]), "vilt_fast.kernels"],
    package_dir={"vilt_fast.kernels": "kernels"},
    ext_modules=[Extension("vilt_fast._C", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
