"""A package that is compiled: its source, the patched tree, the locked environment, the build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from voltforge.binary import loader
from voltforge.compile import build_variables, jobs, sandbox
from voltforge.compile.build import Build
from voltforge.compile.object_cache import ObjectCache
from voltforge.compile.sandbox import Sandbox
from voltforge.compile.scheduler import Scheduler
from voltforge.compile.toolchain import Toolchain
from voltforge.pipeline import package
from voltforge.pipeline.checkout import Checkout
from voltforge.pipeline.results import BuiltWheel, SourceFile
from voltforge.pipeline.stage import Stage, Values
from voltforge.sources import environment, materials, options, patches, tree
from voltforge.sources.environment import Environment
from voltforge.sources.materials import Material
from voltforge.sources.patches import Patch
from voltforge.sources.recipe import Source, SourceRecipe
from voltforge.sources.tree import Tree
from voltforge.system import console, files
from voltforge.wheel import sbom, wheelfile
from voltforge.wheel.examined_wheel import Expectation


@dataclass(frozen=True)
class FromSource:
    """The stages of a recipe with a source: ``fetch``, ``tree``, ``environment`` and ``build``."""

    checkout: Checkout
    recipe: SourceRecipe
    toolchain: Stage[Toolchain]
    scheduler: Callable[[], Scheduler]
    """Return the scheduler of compile jobs that all packages of a run share."""
    object_cache: Callable[[], ObjectCache | None]
    """Return the cache of compiled objects, if there is one."""

    @property
    def source(self) -> Source:
        """The source that the recipe names."""
        return self.recipe.source

    @cached_property
    def fetch(self) -> Stage[SourceFile]:
        """The stage that downloads the source."""
        return package.fetching(self.checkout, self.recipe, lambda: self.source)

    @cached_property
    def tree(self) -> Stage[Tree]:
        """The stage that unpacks and patches it."""
        return self.checkout.stage(
            f"tree:{self.recipe.name}", Tree, self._tree_inputs, self._unpack,
            lambda tree: files.folder_digest(tree.path), after=lambda: [self.fetch],
        )  # fmt: skip

    @cached_property
    def environment(self) -> Stage[Environment]:
        """The stage that installs the locked environment of the build."""
        return self.checkout.stage(
            f"environment:{self.recipe.name}", Environment, self._environment_inputs, self._install,
            lambda made: files.folder_digest(made.path),
        )  # fmt: skip

    @cached_property
    def build(self) -> Stage[BuiltWheel]:
        """The stage that compiles and finishes the wheel."""
        # A source that cannot be downloaded is reported before gigabytes are installed for it.
        return self.checkout.stage(
            f"build:{self.recipe.name}", BuiltWheel, self.inputs, self._compile, package.sealed_file,
            after=lambda: [self.fetch, self.tree, self.environment, self.toolchain],
        )  # fmt: skip

    @property
    def stages(self) -> Mapping[str, Stage[Any]]:
        """The stages by kind, in the order of the data."""
        return {
            "fetch": self.fetch,
            "tree": self.tree,
            "environment": self.environment,
            "toolchain": self.toolchain,
            "build": self.build,
        }

    def inputs(self) -> Values:
        """Return the inputs of the build, with its folders at the places where a sandbox shows them."""
        inside = sandbox.Sandbox("bubblewrap")
        places = {name: inside.place(name, Path()) for name in build_variables.FOLDERS}
        toolchain = self.toolchain.result()
        return {
            **self._tree_inputs(),
            "arch": list(self.recipe.arch),
            "environment": dict(self._environment_inputs()),
            "toolchain": dict(toolchain.identity),
            "variables": build_variables.variables(self.recipe, self.tree.result(), toolchain, places),
            "config_settings": dict(self.recipe.build.config_settings),
            "finish": self.recipe.finish.model_dump(mode="json"),
            **sbom.inputs(),
        }

    def materials(self) -> list[Material]:
        """Return the source, the patches, the lock of the environment with its entries, and the toolchain."""
        return [
            materials.of_source(self.source),
            *(materials.of_file(patch.path, "patch") for patch in self.patches()),
            *materials.of_lock(self.recipe.beside(self.recipe.build.lock)),
            *self.toolchain.result().materials,
        ]

    def expectation(self) -> Expectation:
        """Return what the recipe requires of its wheel, its RUNPATHs and build variables included."""
        entries = {entry for group in self.recipe.finish.runpath.values() for entry in group}
        variables = dict(self.recipe.build.env)
        return replace(package.expectation(self.recipe), runpath=tuple(sorted(entries)), variables=variables)

    def patches(self) -> tuple[Patch, ...]:
        """Return the patch series of the package."""
        return patches.series(self.checkout.root / "patches" / self.recipe.name)

    def build_in(self, sandbox: Sandbox) -> Build:
        """Return the build in a sandbox; the stages before ``build`` must have run."""
        inputs, settings = dict(self.inputs()), self.checkout.settings
        decisive = files.digest({name: inputs[name] for name in ("arch", "environment", "toolchain", "variables")})
        patched = self.tree.result()
        scheduled = Build.can_be_scheduled(patched)
        count = self.scheduler().jobs if scheduled else jobs.count(settings.jobs, self.recipe.build.memory_per_job)[0]
        return Build(
            self.recipe, patched, self.environment.result(), self.toolchain.result(), sandbox, count,
            self.checkout.scratch / "work" / f"{self.recipe.name}-{decisive[:12]}",
            self.scheduler() if scheduled else None, self.object_cache() if scheduled else None,
        )  # fmt: skip

    # The inputs of the stages.

    def _tree_inputs(self) -> Values:
        patches = {patch.path.name: patch.sha256 for patch in self.patches()}
        return {**package.source_inputs(self.source), "patches": patches}

    def _environment_inputs(self) -> Values:
        lock = self.recipe.beside(self.recipe.build.lock)
        links = {"links": list(self.recipe.build.links)} if self.recipe.build.links else {}
        return {"lock": {lock.name: files.sha256(lock)}, "python": environment.interpreter(), **links}

    # The work of the stages.

    def _unpack(self, _: str) -> Tree:
        patches = self.patches()
        console.step(f"unpack {self.source.file} and apply {len(patches)} patches")
        return tree.create(self.fetch.result().path, patches, self.checkout.scratch / "trees" / self.recipe.name)

    def _install(self, _: str) -> Environment:
        lock = self.recipe.beside(self.recipe.build.lock)
        console.step(f"environment {lock.stem}")
        made = self.checkout.environment(lock, lock.stem)
        for folder in {path for pattern in self.recipe.build.links for path in made.site_packages.glob(pattern)}:
            loader.link_libraries(folder)
        return made

    def _compile(self, key: str) -> BuiltWheel:
        chosen = sandbox.choose(self.checkout.settings.sandbox)
        build = self.build_in(chosen)
        options.check_variables(self.recipe, build.tree.path)
        console.step(f"build {self.recipe.name} {self.recipe.version} with {build.toolchain}")
        console.note(f"at most {build.jobs} jobs, fewer when memory is short; sandbox: {chosen.kind}")
        if chosen.kind == "none":
            console.warn("this build is not isolated from the network; ./doit doctor says what is missing")
        built = build.compile(self.checkout.scratch / "logs" / f"{self.recipe.name}.log")
        wheel = wheelfile.finish(
            built.wheel, self.checkout.wheel_folder(self.recipe.name, key),
            runpath=self.recipe.finish.runpath, epoch=build.tree.epoch,
            complete=lambda folder, epoch: sbom.embed(folder, self.recipe.name, self.materials(), epoch),
        )  # fmt: skip
        console.note(f"{wheel.name}, {files.size(wheel.stat().st_size)}, {built.usage}")
        if build.cache:
            console.note(str(built.cache_stats))
        if len(built.hosts) > 1:
            console.note(f"compiled by {', '.join(f'{name}: {count}' for name, count in sorted(built.hosts.items()))}")
        return BuiltWheel(
            wheel,
            files.sha256(wheel),
            commit=self.recipe.source.commit,
            linked=dict(built.linked),
            sandbox=chosen.kind,
            hermetic=chosen.hermetic,
            jobs=build.jobs,
            usage=built.usage,
            objects=built.cache_stats if build.cache else None,
            hosts=dict(built.hosts),
        )
