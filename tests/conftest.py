"""What the tests share: the checkout, its toolchain, and a small checkout that nothing was built in yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.checkouts import ROOT, small_checkout
from tests.tally import Tally
from voltforge import signing
from voltforge.checkout import Settings
from voltforge.pipeline import Pipeline
from voltforge.signing import Signer
from voltforge.toolchain import Toolchain

# The same commit gives the same answer. `pytest --hypothesis-profile=explore` looks for what nobody has tried yet.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that is tested."""
    return ROOT


@pytest.fixture(scope="session")
def toolchain(repository: Path) -> Toolchain:
    """The CUDA 12 toolkit that this machine finds or puts together, in the checkout's own build/."""
    pipeline = Pipeline.load(repository, Settings())
    pipeline.toolchain.run()
    return pipeline.package(pipeline.recipes["vllm"]).toolchain()


@pytest.fixture
def saxpy(tmp_path: Path, toolchain: Toolchain) -> Pipeline:
    """A checkout of its own with one recipe, for the small CUDA package in tests/packages, and nothing built yet.

    The toolchain is the checkout's: putting another together would test nothing more.
    """
    return small_checkout(tmp_path / "checkout")


@pytest.fixture(scope="session")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    """A key of one's own."""
    return signing.make_key(tmp_path_factory.mktemp("signer") / "key.pem")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    """A key that nobody trusts unless a test says so."""
    return signing.make_key(tmp_path_factory.mktemp("stranger") / "key.pem")


@pytest.fixture(scope="session")
def counted() -> Iterator[Tally]:
    """Counts for the table of docs/trust.md: ``counted("kill points recovered")``."""
    tally = Tally()
    yield tally
    tally.keep(ROOT / "build")
