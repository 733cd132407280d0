"""One package on its way to the wheelhouse: the stages that make its wheel, check it and keep it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from voltforge.compile import build_variables, fixed_paths
from voltforge.compile.driver_stub import DriverStub
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Checkout
from voltforge.pipeline.results import BuiltWheel, Checked, CheckedBefore, Receipt, SourceFile
from voltforge.pipeline.stage import Stage, Values
from voltforge.sources import environment, materials
from voltforge.sources.materials import Material
from voltforge.sources.recipe import Recipe, Source
from voltforge.sources.transfer import FetchError
from voltforge.system import console, files, records
from voltforge.wheel import checks, provenance
from voltforge.wheel.examined_wheel import Expectation
from voltforge.wheel.findings import Finding, failed, report
from voltforge.wheel.shared_cache import CacheMiss

STATED = ("commit", "linked", "sandbox", "hermetic")
"""The fields of a built wheel that its provenance states, for users of a shared cache."""
SHARED = {field.name for field in fields(BuiltWheel)} & {field.name for field in fields(Receipt)} - {"sha256"}
"""The fields that a receipt takes over from the built wheel."""


class Maker(Protocol):
    """The stages of one recipe up to the built wheel, and what they use."""

    @property
    def recipe(self) -> Recipe:
        """The recipe."""

    @property
    def source(self) -> Source:
        """The file that the wheel is made from."""

    @property
    def build(self) -> Stage[BuiltWheel]:
        """The last of :attr:`stages`."""

    @property
    def stages(self) -> Mapping[str, Stage[Any]]:
        """The stages by kind, in the order of the data; stages that several packages share included."""

    def inputs(self) -> Values:
        """Return everything that can change the wheel."""

    def materials(self) -> list[Material]:
        """Return what the wheel is made of and with; the stages before ``build`` must have run."""

    def expectation(self) -> Expectation:
        """Return what the checks require of the wheel."""


@dataclass(frozen=True)
class Package:
    """All stages of one recipe: those of its :class:`Maker`, then ``check`` and ``wheels``."""

    checkout: Checkout
    maker: Maker
    driver_stub: Stage[DriverStub]

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.maker.recipe

    @cached_property
    def stages(self) -> Mapping[str, Stage[Any]]:
        """The stages by kind, in the order of the data. A kept wheel makes those before it unnecessary."""
        build = replace(self.maker.build, make=self._build, unless=self.wheels.current)
        made = {**self.maker.stages, "build": build}
        shared = {"toolchain"}
        made |= {"driver-stub": self.driver_stub}
        unless = self.wheels.current
        own = {kind: replace(stage, unless=unless) for kind, stage in made.items() if kind not in shared}
        return {**made, **own, "check": self.check, "wheels": self.wheels}

    @property
    def fetch(self) -> Stage[SourceFile]:
        """The stage that downloads the source."""
        stage: Stage[SourceFile] = self.stages["fetch"]
        return stage

    @property
    def build(self) -> Stage[BuiltWheel]:
        """The stage that makes the wheel."""
        stage: Stage[BuiltWheel] = self.stages["build"]
        return stage

    @cached_property
    def check(self) -> Stage[Checked]:
        """The stage that checks the built wheel."""
        return self.checkout.stage(
            f"check:{self.recipe.name}", Checked, self._check_inputs, self._check,
            after=lambda: [self.stages["build"], self.driver_stub], unless=self.wheels.current,
        )  # fmt: skip

    @cached_property
    def wheels(self) -> Stage[Receipt]:
        """The stage that keeps the checked wheel; its record is the receipt in the wheelhouse."""
        stage = self.checkout.stage(
            f"wheels:{self.recipe.name}", Receipt, self._inputs, self._keep, self._is_kept, after=lambda: [self.check]
        )
        return replace(stage, path=self.checkout.wheelhouse.receipt(self.recipe.name, environment.python_tag()))

    def findings(self, wheel: Path, linked: Mapping[str, int] | None) -> tuple[Finding, ...]:
        """Return the findings of all checks on a wheel, which is installed in a fresh environment for them."""
        recipe = self.recipe
        fresh = self.checkout.environment(recipe.beside(recipe.expect.lock), f"{recipe.name}-verify")
        environment.install_wheel(fresh, wheel)
        hidden = [self.checkout.root.resolve(), *(fixed_paths.ROOT / name for name in build_variables.FOLDERS)]
        findings = checks.verify(
            wheel, self.maker.expectation(), linked=linked, environment=fresh.python,
            driver_stub=self.driver_stub.required().path, forbidden_paths=sorted({str(folder) for folder in hidden}),
        )  # fmt: skip
        findings += [Finding("requirements", "fail", line) for line in environment.unmet_requirements(fresh)]
        files.remove(fresh.path)
        return tuple(findings)

    # The inputs of the stages.

    def _inputs(self) -> Values:
        """Return everything that can change the wheel, and what the checks require of it."""
        expect = self.recipe.expect
        names = [expect.lock, *([expect.ops] if expect.ops else [])]
        hashes = {name: files.sha256(self.recipe.beside(name)) for name in names}
        return {**self.maker.inputs(), "expect": {**expect.model_dump(mode="json"), "files": hashes}}

    def _check_inputs(self) -> Values:
        """Return the inputs and the wheel's SHA-256, because equal inputs can give different bytes."""
        return {**self._inputs(), "wheel": self.build.result().sha256}

    # The work of the stages.

    def _build(self, key: str) -> BuiltWheel:
        """Take the wheel from the shared cache if it has a trusted one that passes all checks, else make it.

        No fault of a cache stops a build.
        """
        return self._from_shared_cache(key) or self.maker.build.make(key)

    def _from_shared_cache(self, key: str) -> BuiltWheel | None:
        cache = self.checkout.cache
        if not cache:
            return None
        answer = cache.find(key, self.checkout.trust, self.checkout.store)
        if isinstance(answer, CacheMiss):
            console.note(answer.why or f"{cache} does not have it")
            return None
        stated = answer.provenance
        console.step(f"{stated.file} from {cache}")
        path = self.checkout.wheel_folder(self.recipe.name, key) / stated.file
        try:
            with answer.wheel.open("rb") as source, files.replacing(path) as sink:
                shutil.copyfileobj(source, sink, files.BLOCK)
            fields = {**stated.build, "path": str(path), "sha256": stated.sha256, "cache": str(cache)}
            wheel = records.decode(BuiltWheel, fields, self.checkout.root)
            findings = self.findings(path, wheel.linked)
        except (VoltforgeError, KeyError, TypeError, ValueError) as error:
            console.warn(f"{stated.file} of the shared cache cannot be used: {error}")
            return None
        if failures := failed(findings):
            first = f"{failures[0].check}: {failures[0].detail}"
            console.warn(f"{stated.file} of the shared cache fails {len(failures)} checks and is not used; {first}")
            return None
        return replace(wheel, checked=CheckedBefore(files.digest(self._inputs()), findings))

    def _check(self, _: str) -> Checked:
        wheel = self.build.result()
        console.step(f"check {wheel.path.name}")
        if wheel.checked and wheel.checked.inputs == files.digest(self._inputs()):
            findings = wheel.checked.findings
        else:
            findings = self.findings(wheel.path, wheel.linked)
        report(findings)
        if failures := failed(findings):
            raise VoltforgeError(
                f"{wheel.path.name} fails {len(failures)} checks and was not kept: "
                + "; ".join(f"{failure.check}: {failure.detail}" for failure in failures),
                hint=f"inspect the wheel: {wheel.path}",
            )
        return Checked(findings)

    def _keep(self, key: str) -> Receipt:
        wheel, house = self.build.result(), self.checkout.wheelhouse
        built = records.encode(wheel, self.checkout.root)
        results = {
            **house.entry(wheel.path),
            **{name: value for name, value in built.items() if name in SHARED},
            "findings": [asdict(finding) for finding in self.check.result().findings],
            "build": {name: built[name] for name in STATED if name in built},
            "build_key": self.stages["build"].key(),
            "materials": [materials.as_json(material) for material in sorted(self.maker.materials())],
        }
        statement = provenance.statement(
            {"stage": self.wheels.name, "key": key, "inputs": self._inputs(), "results": results}
        )
        house.add(wheel.path, statement, self.checkout.signer)
        console.step(f"kept wheelhouse/{results['file']}, {files.size(results['size'])}")
        digest = files.sha256_bytes(statement)
        return records.decode(Receipt, {**results, "statement": digest}, self.checkout.root)

    def _is_kept(self, receipt: Receipt) -> str | None:
        """Return the wheel's SHA-256 if the wheelhouse holds it, with its index pages and the files beside it."""
        held = self.checkout.wheelhouse.holds(records.encode(receipt, self.checkout.root))
        return receipt.sha256 if held else None


def fetching(checkout: Checkout, recipe: Recipe, source: Callable[[], Source]) -> Stage[SourceFile]:
    """Return the stage that downloads the source of a recipe; ``source`` fails if this machine can use none."""

    def make(_: str) -> SourceFile:
        wanted = source()
        console.step(f"fetch {wanted.file}")
        try:
            return SourceFile(checkout.store.get(wanted.artifact))
        except FetchError as error:
            if wanted.otherwise:
                error.hint = f"{error.hint}; {wanted.otherwise}"
            raise

    return checkout.stage(
        f"fetch:{recipe.name}", SourceFile, lambda: source_inputs(source()), make, lambda file: files.sha256(file.path)
    )


def source_inputs(source: Source) -> Values:
    """Return what decides the bytes of a source."""
    return {"source": {"file": source.file, "sha256": source.sha256}}


def sealed_file(wheel: BuiltWheel) -> str:
    """Return the SHA-256 of a built wheel as it is on disk."""
    return files.sha256(wheel.path)


def expectation(recipe: Recipe) -> Expectation:
    """Return what a recipe requires of its wheel."""
    expect = recipe.expect
    ops = recipe.beside(expect.ops).read_text(encoding="utf-8").split() if expect.ops else []
    return Expectation(**expect.model_dump(exclude={"lock", "ops"}), ops=tuple(ops), arch=recipe.arch)
