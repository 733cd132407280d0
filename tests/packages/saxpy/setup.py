"""Builds saxpy._C with CMake and ninja, as vLLM and PyTorch build theirs."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = (ROOT / self.get_ext_fullpath(ext.name)).resolve().parent
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        arch = os.environ["TORCH_CUDA_ARCH_LIST"].replace(".", "")
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
        configure += [f"-DCMAKE_CUDA_ARCHITECTURES={arch}-real", f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(folder), "-j", os.environ.get("MAX_JOBS", "1")])
        subprocess.check_call(["cmake", "--install", str(folder), "--prefix", str(target)])


setup(
    packages=["saxpy"],
    ext_modules=[Extension("saxpy._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
