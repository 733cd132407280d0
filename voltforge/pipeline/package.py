"""One package on its way to the wheelhouse: what its stages have in common, however the wheel is made."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from voltforge.compile import build, sandbox
from voltforge.compile.toolchain import HostCompiler, Toolchain
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Checkout
from voltforge.pipeline.stage import Stage, Values
from voltforge.sources import environment, materials
from voltforge.sources.environment import Environment
from voltforge.sources.fetch import Artifact, FetchError, NotFetchedError
from voltforge.sources.materials import Material
from voltforge.sources.recipe import Recipe, Source
from voltforge.system import console, files
from voltforge.wheel import checks, provenance, sbom, wheelfile, wheelhouse
from voltforge.wheel.checks import Expectation, Finding
from voltforge.wheel.shared_cache import Miss

BUILT = ("commit", "linked", "sandbox", "hermetic")
"""What the build stage says of a wheel besides its bytes, for whoever gets it from a shared cache."""


class Package(ABC):
    """The stages of one recipe; the stage called ``build`` gives the wheel's path, sha256 and ``linked``."""

    recipe: Recipe

    def __init__(self, checkout: Checkout, toolkit: Stage) -> None:
        self.checkout = checkout
        self.toolkit = toolkit
        """The stage that chooses the toolchain, which all packages share."""

    @property
    @abstractmethod
    def source(self) -> Source:
        """The file that it is made of."""

    @abstractmethod
    def made_of(self) -> Values:
        """Everything that can change the wheel."""

    @abstractmethod
    def materials(self) -> list[Material]:
        """What the wheel is made of and with, each by its hash; the stages before ``build`` must have run."""

    @abstractmethod
    def making(self, kept: Stage) -> dict[str, Stage]:
        """The stages from ``fetch`` to ``build``, by kind; ``kept``, the last, makes most of them needless."""

    def stages(self) -> dict[str, Stage]:
        """All stages by kind: ``fetch``, …, ``build``, ``check``, ``wheels``."""
        house, name = self.checkout.wheelhouse, self.recipe.name
        receipt = house.receipt(name, environment.python_tag())
        kept = Stage(f"wheels:{name}", receipt, self._picture, self._keep, house.holds, lambda: [self.stage("check")])
        after = "build", "toolchain"  # which has the driver's stub
        check = self.planned("check", self._checked, self._check, lambda _: True, after, kept)
        fetch = self.planned("fetch", self.fetched_by, self._fetch, self._held, (), kept)
        return {"fetch": fetch, **self.making(kept), "check": check, "wheels": kept}

    def stage(self, kind: str) -> Stage:
        """The stage of that kind, or the toolchain's."""
        return self.toolkit if kind == "toolchain" else self.stages()[kind]

    def has(self, kind: str) -> bool:
        """Whether there is a stage of that kind: a wheel that is thinned has no tree."""
        return kind == "toolchain" or kind in self.stages()

    def planned(
        self,
        kind: str,
        inputs: Callable[[], Values],
        make: Callable[[str], Values],
        intact: Callable[[Values], bool],
        after: tuple[str, ...] = (),
        unless: Stage | None = None,
    ) -> Stage:
        """A stage of this package, with its record where the checkout keeps it."""
        name = f"{kind}:{self.recipe.name}"
        return Stage(
            name, self.checkout.record(name), inputs, make, intact, lambda: [self.stage(one) for one in after], unless
        )

    def toolchain(self) -> Toolchain:
        """What it is compiled with; its stage must have run."""
        kept = self.toolkit.results()
        host = HostCompiler(Path(kept["host"]["cxx"]), Path(kept["host"]["cc"]), kept["host"]["version"])
        return Toolchain(
            Path(kept["home"]), kept["origin"], kept["version"], host, Path(kept["driver_stub"]), kept["identity"]
        )

    def fetched_by(self) -> Values:
        """What decides the bytes of the source."""
        return {"source": {"file": self.source.file, "sha256": self.source.sha256}}

    def fetched(self, beside: Sequence[Artifact] = ()) -> Path:
        """The source, by its hash; files ``beside`` it are fetched at the same time, and it is said if they cannot be.

        Raises:
            FetchError: it cannot be had; the recipe may know what to do then.
        """
        ours, store = self.source.artifact, self.checkout.store
        try:
            return store.get_all([ours, *beside])[0]
        except FetchError as error:
            lost = [one.artifact for one in error.missing] if isinstance(error, NotFetchedError) else [ours]
            if ours not in lost:
                console.warn(f"{', '.join(one.file for one in lost)}: needed later, and not to be had so far")
                return store.get(ours)
            if self.source.otherwise:
                error.hint = f"{error.hint}; {self.source.otherwise}"
            raise

    def settled(self, lock: Path, name: str) -> Environment:
        """A new environment with what ``lock`` names."""
        store = self.checkout.store
        return environment.create(
            lock, self.checkout.scratch / "environments" / name, store.indexes, offline=store.offline
        )

    def expectation(self) -> Expectation:
        """What the recipe holds its wheel to."""
        expect = self.recipe.expect
        ops = self.recipe.beside(expect.ops).read_text(encoding="utf-8").split() if expect.ops else []
        return Expectation(**expect.model_dump(exclude={"lock", "ops"}), ops=tuple(ops), arch=self.recipe.arch)

    def examined(self, path: Path, linked: Mapping[str, int] | None) -> list[Finding]:
        """All findings on a wheel, which is installed in a fresh environment for it."""
        fresh = self.settled(self.recipe.beside(self.recipe.expect.lock), f"{self.recipe.name}-verify")
        environment.install_wheel(fresh, path)
        hidden = [self.checkout.root.resolve(), *(sandbox.ROOT / name for name in build.FOLDERS)]
        findings = checks.verify(
            path, self.expectation(), linked=linked, environment=fresh.python, driver_stub=self.toolchain().driver_stub,
            forbidden_paths=sorted({str(folder) for folder in hidden}),
        )  # fmt: skip
        findings += [Finding("requirements", "fail", line) for line in environment.unmet_requirements(fresh)]
        files.remove(fresh.path)
        return findings

    def shared(self, make: Callable[[str], Values]) -> Callable[[str], Values]:
        """``make``, or what the shared cache has under the same key, where a trusted key signed it and all checks pass.

        Nothing that a cache does stops a build.
        """
        return lambda key: self._taken(key) or make(key)

    def _taken(self, key: str) -> Values | None:
        cache = self.checkout.cache
        if not cache:
            return None
        found = cache.find(key, self.checkout.trust, self.checkout.store)
        if isinstance(found, Miss):
            console.note(found.why or f"{cache} does not have it")
            return None
        said = found.provenance
        console.step(f"{said.file} from {cache}")
        path = self.checkout.scratch / "wheels" / f"{self.recipe.name}-{key[:12]}" / said.file
        self.toolkit.run()
        try:
            with found.wheel.open("rb") as source, files.replacing(path) as sink:
                shutil.copyfileobj(source, sink, files.BLOCK)
            built = dict(said.build)
            findings = self.examined(path, built["linked"])
        except (VoltforgeError, KeyError, TypeError, ValueError) as error:
            console.warn(f"it cannot be used: {error}")
            return None
        if broken := checks.failed(findings):
            console.warn(f"it fails {len(broken)} checks, {broken[0].check} first, and is not used: {broken[0].detail}")
            return None
        examined = {"for": files.digest(self._picture()), "findings": [asdict(finding) for finding in findings]}
        return {**built, "path": str(path), "sha256": said.sha256, "cache": str(cache), "examined": examined}

    def written(self) -> Values:
        """What decides the bytes of a wheel besides its content."""
        return {
            "compression": wheelfile.DEFLATE,
            "sbom": f"cyclonedx-python-lib {metadata.version('cyclonedx-python-lib')}",
        }

    def describe(self, folder: Path, epoch: int) -> None:
        """Put the SBOM into an unpacked wheel, where PEP 770 has it."""
        info = wheelfile.dist_info(folder)
        version = info.name.removesuffix(".dist-info").rpartition("-")[2]
        document = sbom.describe(
            folder, name=self.recipe.name, version=version, materials=self.materials(), epoch=epoch
        )
        files.write(info / "sboms" / f"{self.recipe.name}{wheelhouse.SBOM}", document)

    def _held(self, _: Values) -> bool:
        return self.checkout.store.holds(self.source.artifact)

    def _fetch(self, _: str) -> Values:
        console.step(f"fetch {self.source.file}")
        # What other packages need comes along: offline nothing comes, and each says for itself what it lacks.
        return {"path": str(self.fetched([] if self.checkout.store.offline else self.checkout.awaited()))}

    def _picture(self) -> Values:
        """What the wheel was made of and what it was held to."""
        expect = self.recipe.expect.model_dump(mode="json")
        named = [self.recipe.expect.lock, *([self.recipe.expect.ops] if self.recipe.expect.ops else [])]
        return {
            **self.made_of(),
            "expect": {**expect, "files": {file: files.sha256(self.recipe.beside(file)) for file in named}},
        }

    def _checked(self) -> Values:
        """The very wheel that is looked at, besides: the same inputs need not have given the same bytes."""
        return {**self._picture(), "wheel": self.stage("build").results()["sha256"]}

    def _check(self, _: str) -> Values:
        built = self.stage("build").results()
        console.step(f"check {Path(built['path']).name}")
        known = built.get("examined", {})  # a wheel of the cache was, before it was taken
        if known.get("for") == files.digest(self._picture()):
            findings = [Finding(**one) for one in known["findings"]]
        else:
            findings = self.examined(Path(built["path"]), built["linked"])
        checks.report(findings)
        if broken := checks.failed(findings):
            raise VoltforgeError(
                f"{Path(built['path']).name} fails {len(broken)} checks and was not kept: "
                + "; ".join(f"{f.check}: {f.detail}" for f in broken),
                hint=f"the wheel is {built['path']}",
            )
        return {"findings": [asdict(finding) for finding in findings]}

    def _keep(self, key: str) -> Values:
        built, checked = self.stage("build").results(), self.stage("check").results()
        house, path = self.checkout.wheelhouse, Path(built["path"])
        results = {
            **house.entry(path),
            **{name: value for name, value in built.items() if name not in ("path", "examined")},
            **checked,
            "build": {name: built[name] for name in BUILT if name in built},
            "build_key": self.stage("build").key(),
            "materials": [materials.as_json(one) for one in sorted(self.materials())],
        }
        statement = provenance.statement(
            {"stage": f"wheels:{self.recipe.name}", "key": key, "inputs": self._picture(), "results": results}
        )
        house.add(path, statement, self.checkout.signer)
        console.step(f"kept wheelhouse/{results['file']}, {files.size(results['size'])}")
        return {**results, "statement": files.sha256_bytes(statement)}


def folder_stands(results: Values) -> bool:
    """Whether the folder that a stage made is there, with every file as it was."""
    folder = Path(results["path"])
    return folder.is_dir() and files.folder_digest(folder) == results["picture"]


def file_stands(results: Values) -> bool:
    """Whether the file that a stage made is there, byte for byte."""
    return Path(results["path"]).is_file() and files.sha256(Path(results["path"])) == results["sha256"]
