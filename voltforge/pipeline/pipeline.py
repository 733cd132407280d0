"""The recipes of a checkout and all of their stages."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from voltforge.compile import driver_stub, jobs, object_cache, toolchain
from voltforge.compile.costs import Estimate, Estimates
from voltforge.compile.driver_stub import DriverStub
from voltforge.compile.object_cache import ObjectCache
from voltforge.compile.scheduler import Scheduler
from voltforge.compile.toolchain import Toolchain
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Checkout, Settings
from voltforge.pipeline.from_source import FromSource
from voltforge.pipeline.from_wheel import FromWheel
from voltforge.pipeline.package import Package
from voltforge.pipeline.stage import Stage, Values
from voltforge.sources.fetch import Artifact, DownloadError
from voltforge.sources.recipe import CudaRecipe, SourceRecipe, Thin, ThinRecipe, byte_count, load, load_all, load_cuda
from voltforge.system import console, files, programs
from voltforge.wheel import checks, wheelfile
from voltforge.wheel.examined_wheel import Expectation
from voltforge.wheel.findings import Finding

STAGES = ("fetch", "tree", "toolchain", "environment", "build", "driver-stub", "check", "wheels")
"""The kinds of stages, in the order of the data."""


@dataclass(frozen=True)
class Pipeline(Checkout):
    """A checkout with its recipes."""

    recipes: Mapping[str, SourceRecipe | ThinRecipe] = field(default_factory=dict)
    cuda: CudaRecipe = field(kw_only=True)

    @classmethod
    def load(cls, root: Path, settings: Settings) -> Pipeline:
        """Read the recipes of a checkout.

        Raises:
            RecipeError: a recipe is invalid.
            VoltforgeError: no recipe offers what the settings choose.
        """
        recipes = load_all(root / "recipes", settings.choices)
        return cls(root, settings, recipes, cuda=load_cuda(root / "recipes" / "cuda.toml"))

    def check(self) -> None:
        """Check the settings before anything is downloaded.

        Raises:
            VoltforgeError: a setting is invalid.
        """
        jobs.parse(self.settings.jobs)
        _limit(self.settings.memory)
        object_cache.server_of(self.settings.ccache)

    def package(self, recipe: SourceRecipe | ThinRecipe) -> Package:
        """Return the stages of one recipe."""
        maker = FromWheel(self, recipe) if isinstance(recipe, ThinRecipe) else self._from_source(recipe)
        return Package(self, maker, self.driver_stub)

    def source_build(self, name: str) -> FromSource:
        """Return the stages that compile a project.

        Raises:
            VoltforgeError: the project is not compiled, or has no recipe.
        """
        recipe = self.recipes.get(name)
        if not isinstance(recipe, SourceRecipe):
            raise VoltforgeError(f"no recipe compiles {name}", hint="./doit list")
        return self._from_source(recipe)

    def _from_source(self, recipe: SourceRecipe) -> FromSource:
        return FromSource(self, recipe, self.toolchain, lambda: self.scheduler, lambda: self.objects)

    def stages(self) -> dict[str, Stage[Any]]:
        """Return every stage by its name, in the order of the data."""
        packages = [self.package(recipe) for recipe in self.recipes.values()]
        found = [package.stages[kind] for kind in STAGES for package in packages if kind in package.stages]
        return {stage.name: stage for stage in found}

    @cached_property
    def scheduler(self) -> Scheduler:
        """The scheduler of all compile jobs of this run.

        Raises:
            VoltforgeError: ``jobs=`` or ``memory=`` is not valid.
        """
        estimates = {
            name: Estimates(
                self.scratch / "history" / f"{name}.json",
                recipe.build.memory_per_job,
                {pattern: Estimate(heavy.seconds, heavy.memory) for pattern, heavy in recipe.build.heavy.items()},
            )
            for name, recipe in self.recipes.items()
            if isinstance(recipe, SourceRecipe)
        }
        count = jobs.chosen(self.settings.jobs) or jobs.cores()
        return Scheduler(self.scratch / "gate", count, estimates, limit=_limit(self.settings.memory))

    @cached_property
    def objects(self) -> ObjectCache | None:
        """The cache of compiled objects, if it is on.

        Raises:
            VoltforgeError: ``ccache=`` is not the address of an object cache.
        """
        return object_cache.open_cache(self.settings.ccache, self.scratch / "cache" / "ccache")

    def missing_sources(self) -> list[Artifact]:
        """Return the sources of all packages that must be downloaded."""
        artifacts = []
        for package in map(self.package, self.recipes.values()):
            with contextlib.suppress(VoltforgeError):  # its own stage reports a source that this machine cannot use
                if not package.fetch.current():
                    artifacts.append(package.maker.source.artifact)
        return artifacts

    def download(self) -> None:
        """Download the sources of all packages at once; the ``fetch`` stages then find them.

        A source that cannot be downloaded is a warning here; the ``fetch`` stage of its package fails.
        """
        try:
            self.store.get_all(self.missing_sources())
        except DownloadError as error:
            console.warn(f"not downloaded yet: {', '.join(missing.artifact.file for missing in error.missing)}")

    def thin(self, name: str) -> Thin:
        """Return the special rules for thinning a project's wheel; empty rules for a project without a thin recipe."""
        path = self.root / "recipes" / f"{name}-thin.toml"
        recipe = load(path) if path.exists() else None
        return recipe.thin if isinstance(recipe, ThinRecipe) else Thin()

    @cached_property
    def toolchain(self) -> Stage[Toolchain]:
        """The stage that chooses the CUDA toolkit for all packages."""

        def inputs() -> Values:
            variables = {key: os.environ.get(key, "") for key in ("CUDA_HOME", "CUDA_PATH", "CXX")}
            tools = {tool: os.path.realpath(path) for tool in ("nvcc", "g++") if (path := shutil.which(tool))}
            return {
                "recipe": self.cuda.model_dump(mode="json"),
                "locks": [files.sha256(self.cuda.beside(p.lock)) for p in (self.cuda.redist, self.cuda.distro)],
                "choice": self.settings.cuda,
                "asked": variables,
                "found": tools,
            }

        def make(_: str) -> Toolchain:
            console.step("toolchain")
            chosen = toolchain.select(self.cuda, self.settings.cuda, self.store, self.scratch / "toolchains")
            console.note(f"{chosen}, in {_shown(chosen.home, self.root)}")
            return chosen

        return self.stage("toolchain", Toolchain, inputs, make, toolchain.state)

    @cached_property
    def driver_stub(self) -> Stage[DriverStub]:
        """The stage that compiles a stand-in for the driver's library, for checks on machines without a GPU."""
        lock = self.cuda.beside(self.cuda.driver)

        def make(_: str) -> DriverStub:
            console.step("driver stub")
            return driver_stub.from_lock(lock, self.scratch / "driver-stub", self.store, programs.find("gcc"))

        return self.stage(
            "driver-stub",
            DriverStub,
            lambda: {"lock": files.sha256(lock)},
            make,
            lambda stub: files.sha256(stub.library),
            unless=lambda: all(self.package(recipe).wheels.current() for recipe in self.recipes.values()),
        )

    def examined(self, path: Path) -> list[Finding]:
        """Return the findings of all checks on any wheel, by the recipe of its project if there is one.

        Raises:
            VoltforgeError: the file does not exist, or is not a wheel.
        """
        if not path.is_file():
            raise VoltforgeError(f"{path} does not exist", hint="./doit verify file=PATH.whl")
        name = wheelfile.Wheel.read(path).name
        if name not in self.recipes:
            console.note(f"no recipe is called {name}: only the general checks run")
            return checks.verify(path, Expectation())
        return list(self.package(self.recipes[name]).findings(path, None))


def _limit(text: str) -> int | None:
    try:
        return byte_count(text) if text else None
    except ValueError as error:
        raise VoltforgeError(f"memory={text}: {error}", hint="memory=6GiB, or omit it") from None


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
