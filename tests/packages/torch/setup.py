# A small package in PyTorch's shape: setup.py hands variables on to CMake, which builds libraries in build/ and
# installs them into torch/; setuptools packs those, extensions that only call them, and a generated version file.
#
# Variables beside those of CMakeLists.txt:
#
#   TORCH_CUDA_ARCH_LIST=7.0
#   USE_CUSPARSELT=0
#   USE_CUDSS=0
#   USE_CUFILE=0
#   USE_NVSHMEM=0
#   USE_MAGMA=0
#   USE_NNPACK=0
#   USE_ITT=0
#   USE_NUMA=0
#   USE_CCACHE=0
#   USE_XPU=0
#   USE_ROCM=0
#   USE_MPI=0
#     refused if they are 1
#
#   USE_GLOO=1
#   USE_TENSORPIPE=1
#     without effect
#
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build"
HANDED_ON = ("BLAS", "CUDNN_ROOT")
PREFIXES = ("BUILD_", "USE_", "CMAKE_")
VERSION = os.environ["PYTORCH_BUILD_VERSION"]
if int(os.environ["PYTORCH_BUILD_NUMBER"]) > 1:
    VERSION += f".post{os.environ['PYTORCH_BUILD_NUMBER']}"


def build_libraries():
    options = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES) or name in HANDED_ON}
    words = [f"-D{name}={value}" for name, value in sorted(options.items())]
    python = f"-DPython_EXECUTABLE={sys.executable}"
    subprocess.check_call(["cmake", "-G", "Ninja", "-S", ROOT, "-B", BUILD, python, *words])
    subprocess.check_call(["cmake", "--build", BUILD, "-j", os.environ["MAX_JOBS"]])
    subprocess.check_call(["cmake", "--install", BUILD, "--prefix", ROOT / "torch"])


def write_version():
    cuda = subprocess.check_output(["nvcc", "--version"], text=True).partition("release ")[2].partition(",")[0]
    (ROOT / "torch/version.py").write_text(f"__version__ = '{VERSION}'\ncuda = '{cuda}'\n")


def extension(name, lib):
    link = f"-Wl,-rpath,$ORIGIN/{lib}"
    return Extension(
        name, ["csrc/stub.c"], libraries=["torch_python"], library_dirs=["torch/lib"], extra_link_args=[link]
    )


if "bdist_wheel" in sys.argv:  # setuptools looks for files to pack before it builds extensions
    write_version()
    build_libraries()
setup(
    name="torch",
    version=VERSION,
    packages=["torch", "torch.backends", "functorch"],
    package_data={"torch": ["lib/*.so", "bin/*"]},
    ext_modules=[extension("torch._C", "lib"), extension("functorch._C", "../torch/lib")],
    install_requires=[one.strip() for one in os.environ["PYTORCH_EXTRA_INSTALL_REQUIREMENTS"].split("|")],
)
