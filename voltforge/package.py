"""One package on its way from source to wheelhouse: its stages, what each is made of and what it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from voltforge import build, console, environment, files, jobs, sandbox, tree, verify, wheel
from voltforge.checkout import Checkout
from voltforge.environment import Environment
from voltforge.errors import VoltforgeError
from voltforge.recipe import Recipe
from voltforge.stage import Stage, Values
from voltforge.toolchain import HostCompiler, Toolchain
from voltforge.tree import Patch, Tree
from voltforge.verify import Expectation, Finding


class Package:
    """The stages of one recipe."""

    def __init__(self, checkout: Checkout, recipe: Recipe, toolkit: Stage) -> None:
        self.checkout = checkout
        self.recipe = recipe
        self.toolkit = toolkit
        """The stage that chooses the toolchain, which all packages share."""

    def stage(self, kind: str) -> Stage:
        """The stage of that kind: fetch, tree, environment, build, check or wheels."""
        house, name = self.checkout.wheelhouse, self.recipe.name
        kept = Stage(f"wheels:{name}", house.receipt(name), self._picture, self._keep, house.holds, (f"check:{name}",))
        tree_after, build_after = (f"fetch:{name}",), (f"tree:{name}", f"environment:{name}", "toolchain")
        stages = {
            "fetch": self._stage("fetch", self._source, self._fetch, self._held),
            "tree": self._stage("tree", self._patched, self._grow, _folder, tree_after),
            "environment": self._stage("environment", self._locked, self._settle, _folder, (), kept),
            "build": self._stage("build", self._made_of, self._build, _file, build_after, kept),
            "check": self._stage("check", self._checked, self._check, lambda _: True, (f"build:{name}",), kept),
            "wheels": kept,
        }
        return stages[kind]

    def _stage(
        self,
        kind: str,
        inputs: Callable[[], Values],
        make: Callable[[str], Values],
        intact: Callable[[Values], bool],
        after: tuple[str, ...] = (),
        unless: Stage | None = None,
    ) -> Stage:
        name = f"{kind}:{self.recipe.name}"
        return Stage(name, self.checkout.record(name), inputs, make, intact, after, unless)

    # What the stages are made of.

    def _source(self) -> Values:
        return {"source": {"file": self.recipe.source.file, "sha256": self.recipe.source.sha256}}

    def _patched(self) -> Values:
        return {**self._source(), "patches": {patch.path.name: patch.sha256 for patch in self.series()}}

    def _locked(self) -> Values:
        lock = self.recipe.beside(self.recipe.build.lock)
        return {"lock": {lock.name: files.sha256(lock)}, "python": environment.interpreter()}

    def _made_of(self) -> Values:
        """Everything that can change the wheel: the build's inputs, with its folders where a sandbox shows them."""
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
            "compression": wheel.DEFLATE,
        }

    def _picture(self) -> Values:
        """What the wheel was made of and what it was held to."""
        expect = self.recipe.expect.model_dump(mode="json")
        named = [self.recipe.expect.lock, *([self.recipe.expect.ops] if self.recipe.expect.ops else [])]
        return {
            **self._made_of(),
            "expect": {**expect, "files": {file: files.sha256(self.recipe.beside(file)) for file in named}},
        }

    def _checked(self) -> Values:
        """The very wheel that is looked at, besides: the same inputs need not have given the same bytes."""
        return {**self._picture(), "wheel": self.stage("build").results()["sha256"]}

    # The values that the stages hand on.

    def _held(self, _: Values) -> bool:
        return self.checkout.store.holds(self.recipe.source.artifact)

    def series(self) -> tuple[Patch, ...]:
        """The patches of this package."""
        return tree.series(self.checkout.root / "patches" / self.recipe.name)

    def tree(self) -> Tree:
        """The patched source; its stage must have run."""
        kept = self.stage("tree").results()
        return Tree(Path(kept["path"]), kept["epoch"])

    def toolchain(self) -> Toolchain:
        """What it is compiled with; its stage must have run."""
        kept = self.toolkit.results()
        host = HostCompiler(Path(kept["host"]["cxx"]), Path(kept["host"]["cc"]), kept["host"]["version"])
        return Toolchain(
            Path(kept["home"]), kept["origin"], kept["version"], host, Path(kept["driver_stub"]), kept["identity"]
        )

    # What the stages do.

    def _fetch(self, _: str) -> Values:
        console.step(f"fetch {self.recipe.source.file}")
        path = self.checkout.store.get(self.recipe.source.artifact)
        return {"path": str(path)}

    def _grow(self, _: str) -> Values:
        patches = self.series()
        console.step(f"unpack {self.recipe.source.file} and apply {len(patches)} patches")
        archive = self.checkout.store.get(self.recipe.source.artifact)
        grown = tree.grow(archive, patches, self.checkout.scratch / "trees" / self.recipe.name)
        return {"path": str(grown.path), "epoch": grown.epoch}

    def _settle(self, _: str) -> Values:
        lock = self.recipe.beside(self.recipe.build.lock)
        console.step(f"environment {lock.stem}")
        return {"path": str(self._settled(lock, lock.stem).path)}

    def _settled(self, lock: Path, name: str) -> Environment:
        store = self.checkout.store
        return environment.create(
            lock, self.checkout.scratch / "environments" / name, store.indexes, offline=store.offline
        )

    def _build(self, key: str) -> Values:
        around = sandbox.choose(self.checkout.settings.sandbox)
        count, why = jobs.count(self.checkout.settings.jobs, self.recipe.build.memory_per_job)
        made_of, chosen, grown = dict(self._made_of()), self.toolchain(), self.tree()
        console.step(f"build {self.recipe.name} {self.recipe.version} with {chosen}")
        console.note(f"{count} jobs ({why}), sandbox: {around.kind}")
        if around.kind == "none":
            console.warn("nothing keeps this build from the network: ./doit doctor says what is missing")
        settings = files.digest({name: made_of[name] for name in ("arch", "environment", "toolchain", "variables")})
        built = build.compile(
            self.recipe, grown, Environment(Path(self.stage("environment").results()["path"])), chosen,
            sandbox=around, jobs=count, work=self.checkout.scratch / "work" / f"{self.recipe.name}-{settings[:12]}",
            log=self.checkout.scratch / "logs" / f"{self.recipe.name}.log",
        )  # fmt: skip
        folder = self.checkout.scratch / "wheels" / f"{self.recipe.name}-{key[:12]}"
        finished = wheel.finish(built.wheel, folder, runpath=self.recipe.finish.runpath, epoch=grown.epoch)
        console.note(f"{finished.name}, {files.size(finished.stat().st_size)}, {built.usage}")
        return {
            "path": str(finished),
            "sha256": files.sha256(finished),
            "linked": dict(built.linked),
            "sandbox": around.kind,
            "hermetic": around.hermetic,
            "jobs": count,
            "usage": asdict(built.usage),
        }

    def _check(self, _: str) -> Values:
        built = self.stage("build").results()
        console.step(f"check {Path(built['path']).name}")
        findings = self.examined(Path(built["path"]), built["linked"])
        verify.report(findings)
        if broken := verify.failed(findings):
            raise VoltforgeError(
                f"{Path(built['path']).name} fails {len(broken)} checks and was not kept: "
                + "; ".join(f"{f.check}: {f.detail}" for f in broken),
                hint=f"the wheel is {built['path']}",
            )
        return {"findings": [asdict(finding) for finding in findings]}

    def expectation(self) -> Expectation:
        """What the recipe holds its wheel to."""
        expect = self.recipe.expect
        ops = self.recipe.beside(expect.ops).read_text(encoding="utf-8").split() if expect.ops else []
        entries = {entry for group in self.recipe.finish.runpath.values() for entry in group}
        return Expectation(
            **expect.model_dump(exclude={"lock", "ops"}),
            ops=tuple(ops),
            arch=self.recipe.arch,
            runpath=tuple(sorted(entries)),
        )

    def examined(self, path: Path, linked: Mapping[str, int] | None) -> list[Finding]:
        """All findings on a wheel, which is installed in a fresh environment for it."""
        fresh = self._settled(self.recipe.beside(self.recipe.expect.lock), f"{self.recipe.name}-verify")
        environment.add(fresh, path)
        hidden = [self.checkout.root.resolve(), *(sandbox.ROOT / name for name in build.FOLDERS)]
        findings = verify.verify(
            path, self.expectation(), linked=linked, environment=fresh.python, driver_stub=self.toolchain().driver_stub,
            forbidden_paths=sorted({str(folder) for folder in hidden}),
        )  # fmt: skip
        findings += [Finding("requirements", "fail", line) for line in environment.unmet(fresh)]
        files.remove(fresh.path)
        return findings

    def _keep(self, _: str) -> Values:
        built, checked = self.stage("build").results(), self.stage("check").results()
        kept = self.checkout.wheelhouse.add(Path(built["path"]))
        console.step(f"kept wheelhouse/{kept['file']}, {files.size(kept['size'])}")
        return {**kept, **{name: built[name] for name in ("sandbox", "hermetic", "linked", "usage")}, **checked}


def _folder(results: Values) -> bool:
    return Path(results["path"]).is_dir()


def _file(results: Values) -> bool:
    return Path(results["path"]).is_file() and files.sha256(Path(results["path"])) == results["sha256"]
