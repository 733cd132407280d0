"""The stages of every package, and what each takes from the one before."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from voltforge import build, console, environment, files, jobs, sandbox, toolchain, tree, verify, wheel
from voltforge.environment import Environment
from voltforge.errors import VoltforgeError
from voltforge.fetch import Store
from voltforge.recipe import CudaRecipe, Recipe, load_all, load_cuda
from voltforge.stage import Stage, Values
from voltforge.toolchain import HostCompiler, Toolchain
from voltforge.verify import Expectation, Finding
from voltforge.wheelhouse import Wheelhouse

STAGES = ("fetch", "tree", "toolchain", "environment", "build", "verify", "wheels")
"""In the order that the data takes."""


@dataclass(frozen=True)
class Settings:
    """What a person may choose on the command line, as ``name=value``."""

    cuda: str = "auto"
    """Which toolkit: auto, system, redist or distro."""
    jobs: str = ""
    """Compile jobs at once; empty for as many as cores and memory allow."""
    sandbox: str = "auto"
    """auto, require or off."""
    file: str = ""
    """A wheel, for ``verify``."""


class Pipeline:
    """The stages for the recipes of a checkout.

    Everything transient is under ``build/``: losing it costs time, never a result.
    """

    def __init__(self, root: Path, settings: Settings, recipes: Mapping[str, Recipe], cuda: CudaRecipe) -> None:
        self.root = root
        self.settings = settings
        self.recipes = dict(recipes)
        self.cuda = cuda
        self.scratch = root / "build"
        self.store = Store.from_environment(self.scratch / "downloads")
        self.wheelhouse = Wheelhouse(root / "wheelhouse")

    @classmethod
    def load(cls, root: Path, settings: Settings) -> Pipeline:
        """The pipeline of a checkout.

        Raises:
            RecipeError: one of its recipes cannot be used.
        """
        return cls(root, settings, load_all(root / "recipes"), load_cuda(root / "recipes" / "cuda.toml"))

    def package(self, recipe: Recipe) -> Package:
        """The stages of one recipe."""
        return Package(self, recipe)

    @functools.cached_property
    def toolchain(self) -> Stage:
        """The toolkit that all packages are compiled with."""

        def inputs() -> Values:
            asked = {key: os.environ.get(key, "") for key in ("CUDA_HOME", "CUDA_PATH", "CXX")}
            found = {tool: os.path.realpath(path) for tool in ("nvcc", "g++") if (path := shutil.which(tool))}
            return {"recipe": self.cuda.model_dump(mode="json"), "choice": self.settings.cuda, "asked": asked, "found": found}

        def make(_: str) -> Values:
            console.step("toolchain")
            chosen = toolchain.select(self.cuda, self.settings.cuda, self.store, self.scratch / "toolchains")
            console.note(f"{chosen}, in {_shown(chosen.home, self.root)}")
            return {**_plain(asdict(chosen)), "signature": toolchain.signature(chosen)}

        def intact(results: Values) -> bool:
            return toolchain.stands(results["signature"])

        return Stage("toolchain", self.scratch / "stages" / "toolchain.json", inputs, make, intact)

    def verify_file(self, path: Path) -> list[Finding]:
        """What the checks find in any wheel, held to the recipe of its project if there is one.

        Raises:
            VoltforgeError: there is no such file, or it is no wheel.
        """
        if not path.is_file():
            raise VoltforgeError(f"there is no {path}", hint="./doit verify file=PATH.whl")
        name = wheel.Wheel.read(path).name
        if name not in self.recipes:
            console.note(f"no recipe is called {name}: only what holds for every wheel is checked")
            return verify.verify(path, verify.Expectation())
        self.toolchain.run()
        return self.package(self.recipes[name]).check(path, None)


class Package:
    """The stages of one recipe: what each is made of, and what it does."""

    def __init__(self, pipeline: Pipeline, recipe: Recipe) -> None:
        self.pipeline = pipeline
        self.recipe = recipe
        self.scratch = pipeline.scratch

    def stage(self, kind: str) -> Stage:
        """The stage of that kind, one of :data:`STAGES` but for the toolchain, which all packages share."""
        name = self.recipe.name
        record = self.scratch / "stages" / f"{kind}-{name}.json"
        wheels = (self.pipeline.wheelhouse.receipt(name), self.picture, self.keep, self.pipeline.wheelhouse.holds)
        if kind == "wheels":
            return Stage(f"wheels:{name}", *wheels, after=(f"verify:{name}",))
        parts: dict[str, tuple[Callable[[], Values], Callable[[str], Values], Callable[[Values], bool], tuple[str, ...]]] = {
            "fetch": (self.source, self.fetch, lambda _: self.pipeline.store.holds(self.recipe.source.artifact), ()),
            "tree": (lambda: {**self.source(), "patches": self.patches()}, self.grow, _folder, ("fetch",)),
            "environment": (self.locked, self.settle, _folder, ()),
            "build": (self.made_of, self.build, _file, ("tree", "environment", "toolchain")),
            "verify": (self.picture, self.verify, lambda _: True, ("build",)),
        }
        inputs, make, intact, after = parts[kind]
        before = tuple(stage if stage == "toolchain" else f"{stage}:{name}" for stage in after)
        needless = kind in ("environment", "build", "verify")
        return Stage(f"{kind}:{name}", record, inputs, make, intact, before, self.stage("wheels") if needless else None)

    # What the stages are made of.

    def source(self) -> Values:
        return {"source": {"file": self.recipe.source.file, "sha256": self.recipe.source.sha256}}

    def patches(self) -> dict[str, str]:
        return {patch.path.name: patch.sha256 for patch in self.series()}

    def locked(self) -> Values:
        lock = self.recipe.beside(self.recipe.build.lock)
        return {"lock": {lock.name: files.sha256(lock)}, "python": environment.interpreter()}

    def made_of(self) -> Values:
        """Everything that can change the wheel: the build's inputs, with its folders where a sandbox shows them."""
        inside = sandbox.Sandbox("bubblewrap")
        places = {name: inside.place(name, Path()) for name in build.FOLDERS}
        chosen = self.toolchain()
        return {
            **self.source(),
            "patches": self.patches(),
            "arch": list(self.recipe.arch),
            "environment": dict(self.locked()),
            "toolchain": dict(chosen.identity),
            "variables": build.variables(self.recipe, self.tree(), chosen, places),
            "finish": self.recipe.finish.model_dump(mode="json"),
            "compression": wheel.DEFLATE,
        }

    def picture(self) -> Values:
        """What the wheel was made of and what it was held to."""
        expect = self.recipe.expect.model_dump(mode="json")
        named = [self.recipe.expect.lock, *([self.recipe.expect.ops] if self.recipe.expect.ops else [])]
        return {**self.made_of(), "expect": {**expect, "files": {file: files.sha256(self.recipe.beside(file)) for file in named}}}

    # The values that the stages hand on.

    def series(self) -> tuple[tree.Patch, ...]:
        return tree.series(self.pipeline.root / "patches" / self.recipe.name)

    def tree(self) -> tree.Tree:
        kept = self.stage("tree").results()
        return tree.Tree(Path(kept["path"]), kept["epoch"])

    def toolchain(self) -> Toolchain:
        kept = self.pipeline.toolchain.results()
        host = HostCompiler(Path(kept["host"]["cxx"]), Path(kept["host"]["cc"]), kept["host"]["version"])
        return Toolchain(Path(kept["home"]), kept["origin"], kept["version"], host, Path(kept["driver_stub"]), kept["identity"])

    # What the stages do.

    def fetch(self, _: str) -> Values:
        console.step(f"fetch {self.recipe.source.file}")
        path = self.pipeline.store.get(self.recipe.source.artifact)
        return {"path": str(path)}

    def grow(self, _: str) -> Values:
        patches = self.series()
        console.step(f"unpack {self.recipe.source.file} and apply {len(patches)} patches")
        archive = self.pipeline.store.get(self.recipe.source.artifact)
        grown = tree.grow(archive, patches, self.scratch / "trees" / self.recipe.name)
        return {"path": str(grown.path), "epoch": grown.epoch}

    def settle(self, _: str) -> Values:
        lock = self.recipe.beside(self.recipe.build.lock)
        console.step(f"environment {lock.stem}")
        return {"path": str(self.settled(lock, lock.stem).path)}

    def settled(self, lock: Path, name: str) -> Environment:
        store = self.pipeline.store
        return environment.create(lock, self.scratch / "environments" / name, store.indexes, offline=store.offline)

    def build(self, key: str) -> Values:
        around = sandbox.choose(self.pipeline.settings.sandbox)
        count, why = jobs.count(self.pipeline.settings.jobs, self.recipe.build.memory_per_job)
        made_of, chosen, grown = dict(self.made_of()), self.toolchain(), self.tree()
        console.step(f"build {self.recipe.name} {self.recipe.version} with {chosen}: {count} jobs ({why}), sandbox: {around.kind}")
        if around.kind == "none":
            console.warn("nothing keeps this build from the network: ./doit doctor says what is missing")
        settings = files.digest({name: made_of[name] for name in ("arch", "environment", "toolchain", "variables")})
        built = build.compile(
            self.recipe, grown, Environment(Path(self.stage("environment").results()["path"])), chosen,
            sandbox=around, jobs=count, work=self.scratch / "work" / f"{self.recipe.name}-{settings[:12]}",
            log=self.scratch / "logs" / f"{self.recipe.name}.log",
        )  # fmt: skip
        folder = self.scratch / "wheels" / f"{self.recipe.name}-{key[:12]}"
        finished = wheel.finish(built.wheel, folder, runpath=self.recipe.finish.runpath, epoch=grown.epoch)
        usage = asdict(built.usage)
        console.note(
            f"{finished.name}, {files.size(finished.stat().st_size)}, in {built.usage.wall:.0f} s "
            f"({built.usage.cpu:.0f} s of CPU, {files.size(built.usage.peak)} at most, {files.size(built.usage.peak_one)} in one process)"
        )
        return {"path": str(finished), "sha256": files.sha256(finished), "linked": dict(built.linked),
                "sandbox": around.kind, "hermetic": around.hermetic, "jobs": count, "usage": usage}  # fmt: skip

    def verify(self, _: str) -> Values:
        built = self.stage("build").results()
        console.step(f"verify {Path(built['path']).name}")
        findings = self.check(Path(built["path"]), built["linked"])
        verify.report(findings)
        if broken := verify.failed(findings):
            raise VoltforgeError(
                f"{Path(built['path']).name} fails {len(broken)} checks and was not kept: " + "; ".join(f"{f.check}: {f.detail}" for f in broken),
                hint=f"the wheel is {built['path']}",
            )
        return {"findings": [_plain(asdict(finding)) for finding in findings]}

    def expectation(self) -> Expectation:
        """What the recipe holds its wheel to."""
        expect = self.recipe.expect
        ops = self.recipe.beside(expect.ops).read_text(encoding="utf-8").split() if expect.ops else []
        entries = {entry for group in self.recipe.finish.runpath.values() for entry in group}
        return Expectation(
            **expect.model_dump(exclude={"lock", "ops"}), ops=tuple(ops), arch=self.recipe.arch, runpath=tuple(sorted(entries))
        )

    def check(self, path: Path, linked: Mapping[str, int] | None) -> list[Finding]:
        """All findings on a wheel, which is installed in a fresh environment for it."""
        fresh = self.settled(self.recipe.beside(self.recipe.expect.lock), f"{self.recipe.name}-verify")
        environment.add(fresh, path)
        hidden = [self.pipeline.root.resolve(), *(sandbox.ROOT / name for name in build.FOLDERS)]
        findings = verify.verify(
            path, self.expectation(), linked=linked, environment=fresh.python, driver_stub=self.toolchain().driver_stub,
            forbidden_paths=sorted({str(folder) for folder in hidden}),
        )  # fmt: skip
        findings += [Finding("requirements", "fail", line) for line in environment.unmet(fresh)]
        files.remove(fresh.path)
        return findings

    def keep(self, _: str) -> Values:
        built, checked = self.stage("build").results(), self.stage("verify").results()
        kept = self.pipeline.wheelhouse.add(Path(built["path"]))
        console.step(f"kept wheelhouse/{kept['file']}, {files.size(kept['size'])}")
        return {**kept, **{name: built[name] for name in ("sandbox", "hermetic", "linked", "usage")}, **checked}


def _folder(results: Values) -> bool:
    return Path(results["path"]).is_dir()


def _file(results: Values) -> bool:
    return Path(results["path"]).is_file() and files.sha256(Path(results["path"])) == results["sha256"]


def _plain(value: Any) -> Any:
    """The same value in JSON's types."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
