"""A checkout: its folders, the variables of the command line, its downloads and its wheelhouse."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from voltforge.pipeline.durations import Durations
from voltforge.pipeline.run_lock import RunLock
from voltforge.pipeline.stage import Stage, Values
from voltforge.sources import environment
from voltforge.sources.environment import Environment
from voltforge.sources.fetch import Store
from voltforge.sources.recipe import CHOICES
from voltforge.system.known_hashes import KnownHashes
from voltforge.system.urls import redacted
from voltforge.wheel import signing
from voltforge.wheel.shared_cache import SharedCache
from voltforge.wheel.signing import Signer, Trust
from voltforge.wheel.wheelhouse import Wheelhouse

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The variables of the command line, ``name=value``."""

    cuda: str = "auto"
    """The CUDA toolkit: ``auto``, ``system``, ``redist`` or ``distro``."""
    jobs: str = ""
    """The largest number of compile jobs at once; empty for the number of cores."""
    memory: str = ""
    """The memory that a build may use, such as ``6GiB``; empty for what is free."""
    ccache: str = ""
    """A server with an object cache for several machines; empty for a cache on this disk, ``off`` for none."""
    sandbox: str = "auto"
    """``auto``, ``require`` (fail without bubblewrap) or ``off``."""
    file: str = ""
    """The wheel for ``verify`` and ``thin``."""
    torch: str = CHOICES["torch"]
    """The origin of PyTorch: ``thin`` (from the stock wheel) or ``source`` (compiled)."""
    cudnn: str = CHOICES["cudnn"]
    """``0`` leaves cuDNN out of a PyTorch from source."""
    url: str = ""
    """The address of the server that ``serve:check`` measures."""
    base: str = ""
    """The base of the image, such as ``python:3.11-slim``; empty for a base of the distribution's packages."""
    gc: str = ""
    """``delete`` removes the files that ``gc`` lists."""
    arch: str = "7.0"
    """The architectures that ``thin`` keeps, as in TORCH_CUDA_ARCH_LIST: ``7.0``, or ``9.0;9.0a``."""

    def words(self, *without: str) -> list[str]:
        """Return the words of a command line with these settings, without defaults and the names ``without``."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in without}
        return [f"{name}={value}" for name, value in values.items() if value != getattr(Settings, name)]

    @property
    def choices(self) -> dict[str, str]:
        """The settings that recipes can depend on."""
        return {name: getattr(self, name) for name in CHOICES}


@dataclass(frozen=True)
class Checkout:
    """The folders of a checkout. Losing ``build/`` costs time, never a result."""

    root: Path
    settings: Settings = Settings()

    @property
    def scratch(self) -> Path:
        """``build/``."""
        return self.root / "build"

    @cached_property
    def store(self) -> Store:
        """The downloads, and the mirrors and indexes of the environment variables."""
        return Store.from_environment(self.scratch / "downloads")

    @cached_property
    def run_lock(self) -> RunLock:
        """The lock that one run holds at a time."""
        return RunLock(self.scratch / ".run-lock", " ".join(["doit", *map(redacted, sys.argv[1:])]))

    @property
    def cache(self) -> SharedCache | None:
        """The shared cache ``VOLTFORGE_CACHE``, if it is set."""
        return SharedCache.from_environment()

    @property
    def signer(self) -> Signer | None:
        """The user's own key, if there is one."""
        return signing.configured_keys(os.environ)[0]

    @property
    def trust(self) -> Trust:
        """The public keys that the user trusts."""
        return signing.configured_keys(os.environ)[1]

    @property
    def wheelhouse(self) -> Wheelhouse:
        """The finished wheels."""
        return Wheelhouse(self.root / "wheelhouse", KnownHashes(self.scratch / "history" / "hashes.json"))

    @property
    def durations(self) -> Durations:
        """The durations of the stages on this machine."""
        return Durations(self.record("history"))

    def stage(
        self,
        name: str,
        kind: type[T],
        inputs: Callable[[], Values],
        make: Callable[[str], T],
        seal: Callable[[T], Any] = lambda _: None,
        *,
        after: Callable[[], Sequence[Stage[Any]]] = lambda: (),
        unless: Callable[[], bool] = lambda: False,
    ) -> Stage[T]:
        """Return a stage of this checkout, with its record in ``build/stages/``."""
        return Stage(name, self.record(name), self.root, kind, inputs, make, seal, after, unless)

    def environment(self, lock: Path, name: str) -> Environment:
        """Return a new environment in ``build/environments/`` with what ``lock`` names.

        Raises:
            InstallError: a file of the lock cannot be downloaded, or has another hash.
        """
        path = self.scratch / "environments" / name
        return environment.create(lock, path, self.store.indexes, offline=self.store.offline)

    def wheel_folder(self, project: str, key: str) -> Path:
        """Return the folder of the wheel that is built under a key."""
        return self.scratch / "wheels" / f"{project}-{key[:12]}"

    def record(self, stage: str) -> Path:
        """Return the file of a stage's record; its name is like ``tree:vllm``."""
        return self.scratch / "stages" / f"{stage.replace(':', '-')}.json"
