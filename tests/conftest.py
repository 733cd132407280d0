"""Fixtures of all tests: the checkout, its toolchain, and a small checkout without any build."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from uv import find_uv_bin
from xdist.scheduler import LoadScopeScheduling

from tests.support import selection
from tests.support.checkouts import ROOT, doit, small_checkout
from tests.support.images import small_image
from tests.support.tally import Tally
from tests.support.vllm_python import VllmPython
from voltforge.compile.driver_stub import DriverStub
from voltforge.compile.toolchain import Toolchain
from voltforge.errors import VoltforgeError
from voltforge.gpu import triton_kernels
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources.environment import Environment, create
from voltforge.system import console, files
from voltforge.wheel import signing
from voltforge.wheel.signing import Signer

# The same commit gives the same result. `pytest --hypothesis-profile=explore` searches new examples.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", print_blob=True)
settings.load_profile("repeatable")


# A shell's & and nohup make their children ignore SIGINT or SIGHUP, and the tests send both to theirs. A handler,
# unlike SIG_IGN, is not inherited; for pytest itself nothing changes.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

# The tests read the output as it is in a file: without times, and in the plain width. xdist gives its workers the width
# of a terminal.
os.environ.pop("CI", None)
os.environ.pop("COLUMNS", None)
console.screen.width = console.PLAIN_WIDTH

TOGETHER = {
    "vllm": (
        "kernel_selection",
        "bundle",
        "image",
        "triton_kernels",
        "small_model",
        "gpu_rows",
        "numerics",
        "torch_operations",
        "cuda_kernels",
        "vllm",
    ),
    "/build": ("build", "crash", "keys", "sandbox"),
}
"""Modules that cannot run at the same time: they share the checkout's wheels, or the machine's one ``/build``."""


class OneWorkerEach(LoadScopeScheduling):  # type: ignore[misc]
    """Give each module to one worker, because its fixtures are made once; conflicting modules share a worker."""

    def _split_scope(self, nodeid: str) -> str:
        module = Path(nodeid.partition("::")[0]).stem.removeprefix("test_")
        return next((shared for shared, modules in TOGETHER.items() if module in modules), module)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneWorkerEach:
    """Return the scheduler of ``pytest -n 2``; xdist's own groups have no effect in pytest 9.2."""
    return OneWorkerEach(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Check that no module is missing in :data:`TOGETHER`."""
    strangers = {item.path.name for item in items if "vllm" in getattr(item, "fixturenames", ())}
    if strangers := strangers - {f"test_{module}.py" for module in TOGETHER["vllm"]}:
        raise pytest.UsageError(f"{', '.join(strangers)}: has the checkout's wheels; name it in TOGETHER")


def pytest_report_header() -> str:
    """Return the line about the kill points of this run."""
    return selection.header()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout under test."""
    return ROOT


@pytest.fixture(scope="session")
def toolchain(repository: Path, driver_stub: DriverStub) -> Toolchain:
    """The CUDA 12 toolkit of this machine, found or assembled in the checkout's own build/."""
    pipeline = Pipeline.load(repository, Settings())
    pipeline.scratch.mkdir(exist_ok=True)
    with (pipeline.scratch / "toolchain.lock").open("w") as other_worker:
        fcntl.flock(other_worker, fcntl.LOCK_EX)
        pipeline.toolchain.run()
    return pipeline.toolchain.result()


@pytest.fixture(scope="session")
def driver_stub(repository: Path) -> DriverStub:
    """A stand-in for the driver's library, in the checkout's own build/."""
    pipeline = Pipeline.load(repository, Settings())
    pipeline.scratch.mkdir(exist_ok=True)
    with (pipeline.scratch / "driver-stub.lock").open("w") as other_worker:
        fcntl.flock(other_worker, fcntl.LOCK_EX)
        return pipeline.driver_stub.required()


@pytest.fixture(scope="session")
def vllm(repository: Path, toolchain: Toolchain) -> Pipeline:
    """The checkout after `./doit wheels:vllm`: up to ten minutes on two cores, nothing if it ran before."""
    doit("wheels:vllm")
    return Pipeline.load(repository, Settings())


@pytest.fixture(scope="session")
def installed(vllm: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """A fresh environment with the wheel, installed by uv from the wheelhouse's own index."""
    recipe = vllm.recipes["vllm"]
    folder = tmp_path_factory.mktemp("installed") / "fresh"
    fresh = create(recipe.beside(recipe.expect.lock), folder, vllm.store.indexes)
    simple = (vllm.wheelhouse.path / "simple").as_uri()
    words = ["pip", "install", "--python", str(fresh.python), "--default-index", simple, "--no-deps", "vllm==0.12.0"]
    subprocess.run([find_uv_bin(), *words], check=True, capture_output=True)
    yield fresh
    files.remove(folder)


@pytest.fixture(scope="session")
def vllm_python(vllm: Pipeline, installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> VllmPython:
    """The Python of that environment, on a machine without a GPU."""
    home = {"HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}
    return VllmPython(installed.python, {**triton_kernels.variables(vllm), **home})


@pytest.fixture
def saxpy(tmp_path: Path, toolchain: Toolchain) -> Pipeline:
    """A new checkout with one recipe, for the small CUDA package in tests/packages, and without any build.

    It shares the toolchain of the checkout under test: assembling another would test nothing more.
    """
    return small_checkout(tmp_path / "checkout")


@pytest.fixture(scope="session")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    """A signing key."""
    return signing.make_key(tmp_path_factory.mktemp("signer") / "key.pem")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    """A key that no test trusts by default."""
    return signing.make_key(tmp_path_factory.mktemp("stranger") / "key.pem")


@pytest.fixture(scope="session")
def counted() -> Iterator[Tally]:
    """Counts for the table of docs/trust.md: ``counted("kill points recovered")``."""
    tally = Tally()
    yield tally
    tally.keep(ROOT / "build")


@pytest.fixture(scope="session")
def engine_works(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where no container engine can build: it must mount, which many containers forbid. CI's machine can."""
    try:
        small_image(tmp_path_factory.mktemp("works"), "localhost/voltforge-test:works", "b")
    except VoltforgeError as error:
        pytest.skip(f"no engine can build an image on this machine: {error.what}")
