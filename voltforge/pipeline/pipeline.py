"""The recipes of a checkout and their stages: what the graph is made of."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from voltforge.compile import jobs, object_cache, toolchain
from voltforge.compile.costs import Estimate, Estimates
from voltforge.compile.object_cache import Objects
from voltforge.compile.scheduler import Scheduler
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Checkout, Settings
from voltforge.pipeline.from_source import Compiled
from voltforge.pipeline.from_wheel import Thinned
from voltforge.pipeline.package import Package
from voltforge.pipeline.stage import Stage, Values
from voltforge.sources import materials
from voltforge.sources.fetch import Artifact
from voltforge.sources.recipe import CudaRecipe, SourceRecipe, Thin, ThinRecipe, byte_count, load, load_all, load_cuda
from voltforge.system import console, files
from voltforge.wheel import checks, wheelfile

STAGES = ("fetch", "tree", "toolchain", "environment", "build", "check", "wheels")
"""In the order that the data takes."""


@dataclass(frozen=True)
class Pipeline(Checkout):
    """A checkout with its recipes, and the stages for them."""

    recipes: Mapping[str, SourceRecipe | ThinRecipe] = field(default_factory=dict)
    cuda: CudaRecipe = field(kw_only=True)

    @classmethod
    def load(cls, root: Path, settings: Settings) -> Pipeline:
        """The pipeline of a checkout.

        Raises:
            RecipeError: one of its recipes cannot be used.
            VoltforgeError: no recipe has what the settings choose.
        """
        recipes = load_all(root / "recipes", settings.choices)
        return cls(root, settings, recipes, cuda=load_cuda(root / "recipes" / "cuda.toml"))

    def check(self) -> None:
        """Nothing, if what the person chose can be used: it is told before anything is fetched.

        Raises:
            VoltforgeError: a setting makes no sense.
        """
        jobs.number(self.settings.jobs)
        _limit(self.settings.memory)
        object_cache.named(self.settings.ccache)

    def package(self, recipe: SourceRecipe | ThinRecipe) -> Package:
        """The stages of one recipe."""
        if isinstance(recipe, ThinRecipe):
            return Thinned(self, recipe, self.toolchain)
        return Compiled(self, recipe, self.toolchain, lambda: self.scheduler, lambda: self.objects)

    def stages(self) -> dict[str, Stage]:
        """Every stage by its name, in the order that the data takes."""
        packages = [self.package(recipe) for recipe in self.recipes.values()]
        found = [package.stage(kind) for kind in STAGES for package in packages if package.has(kind)]
        return {stage.name: stage for stage in found}

    @cached_property
    def scheduler(self) -> Scheduler:
        """Where every compiler of this run asks for leave.

        Raises:
            VoltforgeError: ``jobs=`` or ``memory=`` is no number of that.
        """
        needs = {
            name: Estimates(
                self.scratch / "history" / f"{name}.json",
                recipe.build.memory_per_job,
                {pattern: Estimate(heavy.seconds, heavy.memory) for pattern, heavy in recipe.build.heavy.items()},
            )
            for name, recipe in self.recipes.items()
            if isinstance(recipe, SourceRecipe)
        }
        count = jobs.asked(self.settings.jobs) or jobs.cores()
        return Scheduler(self.scratch / "gate", count, needs, limit=_limit(self.settings.memory))

    @cached_property
    def objects(self) -> Objects | None:
        """Where objects that were compiled before are, if they are kept.

        Raises:
            VoltforgeError: ``ccache=`` is no server of objects.
        """
        return object_cache.chosen(self.settings.ccache, self.scratch / "cache" / "ccache")

    def awaited(self) -> list[Artifact]:
        """The sources that this run needs and does not have yet."""
        found = []
        for package in map(self.package, self.recipes.values()):
            fetch = package.stage("fetch")
            with contextlib.suppress(VoltforgeError):  # a package without a source for this machine says so in its turn
                if fetch.name in self.needed and not fetch.current():
                    found.append(package.source.artifact)
        return found

    def thin(self, name: str) -> Thin:
        """What a project's wheel needs beyond what thinning does to every wheel, whatever is built of it here."""
        path = self.root / "recipes" / f"{name}-thin.toml"
        recipe = load(path) if path.exists() else None
        return recipe.thin if isinstance(recipe, ThinRecipe) else Thin()

    @cached_property
    def toolchain(self) -> Stage:
        """The toolkit that all packages are compiled with."""

        def inputs() -> Values:
            asked = {key: os.environ.get(key, "") for key in ("CUDA_HOME", "CUDA_PATH", "CXX")}
            found = {tool: os.path.realpath(path) for tool in ("nvcc", "g++") if (path := shutil.which(tool))}
            return {
                "recipe": self.cuda.model_dump(mode="json"),
                "locks": [files.sha256(self.cuda.beside(p.lock)) for p in (self.cuda.redist, self.cuda.distro)],
                "choice": self.settings.cuda,
                "asked": asked,
                "found": found,
            }

        def make(_: str) -> Values:
            console.step("toolchain")
            chosen = toolchain.select(self.cuda, self.settings.cuda, self.store, self.scratch / "toolchains")
            console.note(f"{chosen}, in {_shown(chosen.home, self.root)}")
            made_of = [materials.as_json(one) for one in toolchain.made_with(chosen, self.cuda)]
            return {**_plain(asdict(chosen)), "signature": toolchain.signature(chosen), "materials": made_of}

        def intact(results: Values) -> bool:
            return toolchain.stands(results["signature"])

        return Stage("toolchain", self.record("toolchain"), inputs, make, intact)

    def examined(self, path: Path) -> list[checks.Finding]:
        """What the checks find in any wheel, held to the recipe of its project if there is one.

        Raises:
            VoltforgeError: there is no such file, or it is no wheel.
        """
        if not path.is_file():
            raise VoltforgeError(f"there is no {path}", hint="./doit verify file=PATH.whl")
        name = wheelfile.Wheel.read(path).name
        if name not in self.recipes:
            console.note(f"no recipe is called {name}: only what holds for every wheel is checked")
            return checks.verify(path, checks.Expectation())
        self.toolchain.run()
        return self.package(self.recipes[name]).examined(path, None)


def _limit(text: str) -> int | None:
    try:
        return byte_count(text) if text else None
    except ValueError as error:
        raise VoltforgeError(f"memory={text}: {error}", hint="memory=6GiB, or leave it out") from None


def _plain(value: Any) -> Any:
    """The same value in JSON's types."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
