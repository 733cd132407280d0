"""A package that is compiled: its source, the patched tree, the environment, the build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from voltforge.binary import elf
from voltforge.compile import build, jobs, sandbox
from voltforge.compile.build import Workshop
from voltforge.compile.object_cache import Objects
from voltforge.compile.sandbox import Sandbox
from voltforge.compile.scheduler import Scheduler
from voltforge.pipeline.checkout import Checkout
from voltforge.pipeline.package import Package, file_stands, folder_stands
from voltforge.pipeline.stage import Stage, Values
from voltforge.sources import environment, materials, options, tree
from voltforge.sources.environment import Environment
from voltforge.sources.materials import Material
from voltforge.sources.recipe import Source, SourceRecipe
from voltforge.sources.tree import Patch, Tree
from voltforge.system import console, files
from voltforge.wheel import wheelfile
from voltforge.wheel.checks import Expectation


class Compiled(Package):
    """The stages of a recipe with a source."""

    def __init__(
        self,
        checkout: Checkout,
        recipe: SourceRecipe,
        toolkit: Stage,
        scheduler: Callable[[], Scheduler],
        objects: Callable[[], Objects | None],
    ) -> None:
        super().__init__(checkout, toolkit)
        self.recipe: SourceRecipe = recipe
        self.scheduler = scheduler
        """Gives what all packages of a run ask for leave to compile."""
        self.objects = objects
        """Gives where objects are that were compiled before."""

    @property
    def source(self) -> Source:
        """The source that the recipe names."""
        return self.recipe.source

    def making(self, kept: Stage) -> dict[str, Stage]:
        """``tree``, ``environment`` and ``build``."""
        # In this order: a source that cannot be had is told before an environment of gigabytes is made for it.
        needed = "fetch", "tree", "environment", "toolchain"
        return {
            "tree": self.planned("tree", self._patched, self._grow, folder_stands, ("fetch",), kept),
            "environment": self.planned("environment", self._locked, self._settle, folder_stands, (), kept),
            "build": self.planned("build", self.made_of, self.shared(self._build), file_stands, needed, kept),
        }

    def expectation(self) -> Expectation:
        """What the recipe holds its wheel to: the RUNPATHs that it was given, and the variables of its build."""
        entries = {entry for group in self.recipe.finish.runpath.values() for entry in group}
        return replace(super().expectation(), runpath=tuple(sorted(entries)), variables=dict(self.recipe.build.env))

    # What the stages are made of.

    def _patched(self) -> Values:
        return {**self.fetched_by(), "patches": {patch.path.name: patch.sha256 for patch in self.series()}}

    def _locked(self) -> Values:
        lock = self.recipe.beside(self.recipe.build.lock)
        links = {"links": list(self.recipe.build.links)} if self.recipe.build.links else {}
        return {"lock": {lock.name: files.sha256(lock)}, "python": environment.interpreter(), **links}

    def made_of(self) -> Values:
        """The build's inputs, with its folders where a sandbox shows them."""
        inside = sandbox.Sandbox("bubblewrap")
        places = {name: inside.place(name, Path()) for name in build.FOLDERS}
        chosen = self.toolchain()
        return {
            **self._patched(),
            "arch": list(self.recipe.arch),
            "environment": dict(self._locked()),
            "toolchain": dict(chosen.identity),
            "variables": build.variables(self.recipe, self.tree(), chosen, places),
            "config_settings": dict(self.recipe.build.config_settings),
            "finish": self.recipe.finish.model_dump(mode="json"),
            **self.written(),
        }

    def materials(self) -> list[Material]:
        """Source, patches, the lock of the environment with its entries, and the toolchain."""
        return [
            materials.of_source(self.source),
            *(materials.of_file(patch.path, "patch") for patch in self.series()),
            *materials.of_lock(self.recipe.beside(self.recipe.build.lock)),
            *map(materials.from_json, self.toolkit.results()["materials"]),
        ]

    # The values that the stages hand on.

    def series(self) -> tuple[Patch, ...]:
        """The patches of this package."""
        return tree.series(self.checkout.root / "patches" / self.recipe.name)

    def tree(self) -> Tree:
        """The patched source; its stage must have run."""
        kept = self.stage("tree").results()
        return Tree(Path(kept["path"]), kept["epoch"])

    def workshop(self, around: Sandbox) -> Workshop:
        """Where it is built; all stages before must have run."""
        made_of, settings = dict(self.made_of()), self.checkout.settings
        decisive = files.digest({name: made_of[name] for name in ("arch", "environment", "toolchain", "variables")})
        grown = self.tree()
        asks = Workshop.can_ask(grown)
        count = self.scheduler().jobs if asks else jobs.count(settings.jobs, self.recipe.build.memory_per_job)[0]
        return Workshop(
            self.recipe, grown, Environment(Path(self.stage("environment").results()["path"])), self.toolchain(),
            around, count, self.checkout.scratch / "work" / f"{self.recipe.name}-{decisive[:12]}",
            self.scheduler() if asks else None, self.objects() if asks else None,
        )  # fmt: skip

    # What the stages do.

    def _grow(self, _: str) -> Values:
        patches = self.series()
        console.step(f"unpack {self.source.file} and apply {len(patches)} patches")
        grown = tree.grow(self.fetched(), patches, self.checkout.scratch / "trees" / self.recipe.name)
        return {"path": str(grown.path), "epoch": grown.epoch, "picture": files.folder_digest(grown.path)}

    def _settle(self, _: str) -> Values:
        lock = self.recipe.beside(self.recipe.build.lock)
        console.step(f"environment {lock.stem}")
        settled = self.settled(lock, lock.stem)
        for folder in {path for pattern in self.recipe.build.links for path in settled.site_packages.glob(pattern)}:
            elf.link_libraries(folder)
        return {"path": str(settled.path), "picture": files.folder_digest(settled.path)}

    def _build(self, key: str) -> Values:
        around = sandbox.choose(self.checkout.settings.sandbox)
        shop = self.workshop(around)
        options.check_variables(self.recipe, shop.tree.path)
        console.step(f"build {self.recipe.name} {self.recipe.version} with {shop.toolchain}")
        console.note(f"{shop.jobs} jobs at most, fewer where memory is short; sandbox: {around.kind}")
        if around.kind == "none":
            console.warn("nothing keeps this build from the network: ./doit doctor says what is missing")
        built = build.compile(shop, self.checkout.scratch / "logs" / f"{self.recipe.name}.log")
        folder = self.checkout.scratch / "wheels" / f"{self.recipe.name}-{key[:12]}"
        finished = wheelfile.finish(built.wheel, folder, runpath=self.recipe.finish.runpath, epoch=shop.tree.epoch,
                                complete=self.describe)  # fmt: skip
        console.note(f"{finished.name}, {files.size(finished.stat().st_size)}, {built.usage}")
        if shop.objects:
            console.note(str(built.found))
        if len(built.hosts) > 1:
            console.note(f"compiled by {', '.join(f'{name}: {count}' for name, count in sorted(built.hosts.items()))}")
        return {
            "path": str(finished),
            "sha256": files.sha256(finished),
            "commit": self.recipe.source.commit,
            "linked": dict(built.linked),
            "sandbox": around.kind,
            "hermetic": around.hermetic,
            "jobs": shop.jobs,
            "usage": asdict(built.usage),
            "objects": asdict(built.found) if shop.objects else None,
            "hosts": dict(built.hosts),
        }
