"""The stock PyTorch wheel is thinned to sm_70."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.support.samples import cubin_hashes as hashes
from tests.support.samples import listed_by_cuobjdump
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import environment, locks
from voltforge.sources.recipe import ThinRecipe, load_all
from voltforge.system import files
from voltforge.wheel.thin import thin_wheel

LEFT_OUT = ("nvidia-cusparselt-cu12", "nvidia-nvshmem-cu12")


def recipe(repository: Path) -> ThinRecipe:
    found = load_all(repository / "recipes", {"torch": "thin"})["torch"]
    assert isinstance(found, ThinRecipe)
    return found


def test_every_stock_torch_wheel_is_in_the_lock(repository):
    locked = (repository / "recipes/locks/vllm-build.txt").read_text()
    stock = recipe(repository).wheels
    assert [wheel.file.split("-")[2] for wheel in stock] == ["cp310", "cp311", "cp312", "cp313"]
    assert all(f"--hash=sha256:{wheel.sha256}" in locked for wheel in stock)


@pytest.fixture(scope="module")
def torch(repository, tmp_path_factory):
    """The stock torch wheel for the running Python, and the same wheel thinned to 7.0."""
    pipeline = Pipeline.load(repository, Settings(torch="thin"))
    stock = pipeline.package(pipeline.recipes["torch"]).fetch.result().path
    folder = tmp_path_factory.mktemp("torch")
    yield stock, thin_wheel(stock, folder, ["7.0"], settings=recipe(repository).thin)
    files.remove(folder)


@pytest.mark.slow
def test_thinned_torch_keeps_exactly_the_sm_70_cubins(torch, tmp_path, toolchain):
    stock, thin = torch
    assert thin.name == stock.name.replace("2.9.0", "2.9.0+sm70.thin")
    assert thin.stat().st_size <= 320_000_000
    for name, units, most in (("libtorch_cuda.so", 397, 212_000_000), ("libtorch_cuda_linalg.so", 107, 36_000_000)):
        before, after = tmp_path / "stock", tmp_path / "thin"
        for archive, folder in ((stock, before), (thin, after)):
            with zipfile.ZipFile(archive) as file:
                file.extract(f"torch/lib/{name}", folder)
        before, after = (folder / "torch/lib" / name for folder in (before, after))
        assert hashes(after) == hashes(before, "sm_70")
        assert [number for number, _, _ in hashes(after)] == list(range(units))
        assert after.stat().st_size <= most
        assert listed_by_cuobjdump(toolchain, after) == {"sm_70": units}
        files.remove(before)
        files.remove(after)


CPU_TEST = """
import torch
from torch.distributed._symmetric_memory import is_nvshmem_available
a, b = torch.randn(300, 300, dtype=torch.float64), torch.randn(300, 4, dtype=torch.float64)
assert torch.allclose(a @ torch.linalg.solve(a, b), b)
assert torch.allclose(torch.fft.ifft(torch.fft.fft(b)).real, b)
assert torch.nn.functional.conv2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3)).sum() == 9 * 36
assert not is_nvshmem_available()
import ctypes, pathlib
ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib/libtorch_cuda_linalg.so"))
assert ctypes.CDLL("libcusparseLt.so.0").cusparseLtInit(None) == 10
torch.cuda.is_available = lambda: True  # without a GPU the list is not looked at
print(torch.__version__, torch.cuda.get_arch_list())
"""


@pytest.mark.slow
def test_thinned_torch_works_with_only_its_remaining_requirements(torch, repository, tmp_path):
    _, thin = torch
    pins = locks.read(repository / "recipes/locks/vllm-build.txt")
    lock = tmp_path / "lock.txt"
    lock.write_text("".join(pin.text for pin in pins if pin.name not in {"torch", *LEFT_OUT}))
    store = Pipeline.load(repository, Settings()).store
    fresh = environment.create(lock, tmp_path / "environment", store.indexes)
    environment.install_wheel(fresh, thin)
    assert environment.unmet_requirements(fresh) == []
    done = subprocess.run([fresh.python, "-I", "-c", CPU_TEST], capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout) == ("", "2.9.0+sm70.thin ['sm_70']\n")
    loaded = fresh.site_packages / "nvidia"
    assert not [path for path in ("cusparselt", "nvshmem") if (loaded / path).exists()]
    files.remove(fresh.path)


@pytest.mark.slow
def test_thinned_torch_is_reproducible(torch, repository, tmp_path):
    stock, thin = torch
    again = thin_wheel(stock, tmp_path, ["7.0"], settings=recipe(repository).thin)
    assert files.sha256(again) == files.sha256(thin)
    again.unlink()
