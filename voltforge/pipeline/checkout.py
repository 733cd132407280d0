"""A checkout: its root, what a person chose on the command line, its downloads and its wheelhouse."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from voltforge.pipeline.durations import History
from voltforge.pipeline.run_lock import Turn
from voltforge.pipeline.stage import Stage, Values
from voltforge.sources import environment
from voltforge.sources.environment import Environment
from voltforge.sources.fetch import Store
from voltforge.sources.index import redacted
from voltforge.sources.recipe import CHOICES
from voltforge.wheel import signing
from voltforge.wheel.shared_cache import Cache
from voltforge.wheel.signing import Signer, Trust
from voltforge.wheel.wheelhouse import Wheelhouse

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What a person may choose on the command line, as ``name=value``."""

    cuda: str = "auto"
    """Which toolkit: auto, system, redist or distro."""
    jobs: str = ""
    """Compile jobs at once; empty for as many as cores and memory allow."""
    memory: str = ""
    """The most that all processes of a build may hold together, such as ``6GiB``; empty for what is free."""
    ccache: str = ""
    """A server that keeps objects for many machines; empty for those of this disk alone, ``off`` for none."""
    sandbox: str = "auto"
    """auto, require or off."""
    file: str = ""
    """A wheel, for ``verify`` and ``thin``."""
    torch: str = CHOICES["torch"]
    """How PyTorch is made: source, or thin (of the stock wheel)."""
    cudnn: str = CHOICES["cudnn"]
    """0 for a PyTorch from source without cuDNN."""
    url: str = ""
    """The address of a running server, for ``serve:check``."""
    base: str = ""
    """The image that ours stands on, such as ``python:3.11-slim``; empty for one of the distribution's packages."""
    gc: str = ""
    """``delete`` for removing what ``gc`` lists."""
    arch: str = "7.0"
    """Architectures that ``thin`` keeps, as in TORCH_CUDA_ARCH_LIST: ``7.0``, or ``9.0;9.0a``."""

    def words(self, *without: str) -> list[str]:
        """What was chosen, as a command line has it, but for some of it."""
        chosen = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in without}
        return [f"{name}={value}" for name, value in chosen.items() if value != getattr(Settings, name)]

    @property
    def choices(self) -> dict[str, str]:
        """Those that recipes can depend on."""
        return {name: getattr(self, name) for name in CHOICES}


@dataclass(frozen=True)
class Checkout:
    """Where everything is. What is transient is under ``build/``: losing it costs time, never a result."""

    root: Path
    settings: Settings = Settings()

    @property
    def scratch(self) -> Path:
        """``build/``."""
        return self.root / "build"

    @cached_property
    def store(self) -> Store:
        """The downloads, with the mirrors and indexes that the environment names."""
        return Store.from_environment(self.scratch / "downloads")

    @cached_property
    def turn(self) -> Turn:
        """The right to change this checkout, which one run has at a time."""
        return Turn(self.scratch / ".turn", " ".join(["doit", *map(redacted, sys.argv[1:])]))

    @property
    def cache(self) -> Cache | None:
        """The shared cache that the environment names, if it names one."""
        return Cache.from_environment()

    @property
    def signer(self) -> Signer | None:
        """The person's own key, if there is one."""
        return signing.configured(os.environ)[0]

    @property
    def trust(self) -> Trust:
        """The keys whose signatures the person believes."""
        return signing.configured(os.environ)[1]

    @property
    def wheelhouse(self) -> Wheelhouse:
        """What came out."""
        return Wheelhouse(self.root / "wheelhouse")

    @property
    def history(self) -> History:
        """How long the stages took here."""
        return History(self.record("history"))

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
