"""A package that is a stock wheel without the device code of other archs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from voltforge.errors import VoltforgeError
from voltforge.pipeline import package
from voltforge.pipeline.checkout import Checkout
from voltforge.pipeline.results import BuiltWheel, SourceFile
from voltforge.pipeline.stage import Stage, Values
from voltforge.sources import environment, materials
from voltforge.sources.materials import Material
from voltforge.sources.recipe import Source, ThinRecipe
from voltforge.system import console, files, programs
from voltforge.system.process import run
from voltforge.wheel import sbom, thin
from voltforge.wheel.examined_wheel import Expectation

TOOLS = ("gcc", "strip", "patchelf")
"""The programs that write a part of the wheel."""
GCC_PARTS = ("cc1", "as", "collect2", "ld")
"""The programs that gcc runs, as ``-print-prog-name`` names them."""


@dataclass(frozen=True)
class FromWheel:
    """The stages of a recipe with stock wheels: ``fetch`` and ``build``."""

    checkout: Checkout
    recipe: ThinRecipe

    @property
    def source(self) -> Source:
        """The stock wheel for the running Python.

        Raises:
            VoltforgeError: the recipe has none.
        """
        tags = set(sys_tags())
        for source in self.recipe.wheels:
            if not tags.isdisjoint(parse_wheel_filename(source.file)[3]):
                return source
        pythons = [source.file.split("-")[2] for source in self.recipe.wheels]
        raise VoltforgeError(
            f"{self.recipe.path.name} has no stock wheel for {environment.python_tag()} on this machine",
            hint=f"run a Python of {', '.join(pythons)}: VOLTFORGE_PYTHON=python3.X ./doit …",
        )

    @cached_property
    def fetch(self) -> Stage[SourceFile]:
        """The stage that downloads the stock wheel."""
        return package.fetching(self.checkout, self.recipe, lambda: self.source)

    @cached_property
    def build(self) -> Stage[BuiltWheel]:
        """The stage that thins it."""
        name = f"build:{self.recipe.name}"
        return self.checkout.stage(
            name, BuiltWheel, self.inputs, self._thin, package.sealed_file, after=lambda: [self.fetch]
        )

    @property
    def stages(self) -> Mapping[str, Stage[Any]]:
        """The stages by kind, in the order of the data."""
        return {"fetch": self.fetch, "build": self.build}

    def inputs(self) -> Values:
        """Return the stock wheel, what is done to it, and the tools that do it."""
        return {
            **package.source_inputs(self.source),
            "arch": list(self.recipe.arch),
            "thin": self.recipe.thin.model_dump(mode="json"),
            "tools": {name: files.sha256(path) for name, path in tools().items()},
            **sbom.inputs(),
        }

    def materials(self) -> list[Material]:
        """Return the stock wheel and the tools."""
        compilers = [Material(name, "compiler", sha256=(files.sha256(path),)) for name, path in tools().items()]
        return [materials.of_source(self.source), *compilers]

    def expectation(self) -> Expectation:
        """Return what the recipe requires of its wheel."""
        return package.expectation(self.recipe)

    def _thin(self, key: str) -> BuiltWheel:
        stock = self.fetch.result().path
        console.step(f"thin {stock.name} to {', '.join(self.recipe.arch)}")
        folder = self.checkout.wheel_folder(self.recipe.name, key)
        wheel = thin.thin_wheel(
            stock, folder, self.recipe.arch, settings=self.recipe.thin,
            complete=lambda tree, epoch: sbom.embed(tree, self.recipe.name, self.materials(), epoch),
        )  # fmt: skip
        console.note(f"{wheel.name}, {files.size(wheel.stat().st_size)} of {files.size(stock.stat().st_size)}")
        return BuiltWheel(wheel, files.sha256(wheel))


def tools() -> dict[str, Path]:
    """Return all programs that write a part of the wheel, by name, with links resolved.

    Raises:
        ProgramMissing: one is not installed.
    """
    paths = {tool: programs.find(tool, f"install {tool}") for tool in TOOLS}
    paths |= {name: shutil.which(path) or path for name, path in _gcc_parts(paths["gcc"]).items()}
    return {name: Path(path).resolve() for name, path in paths.items()}


@cache
def _gcc_parts(gcc: str) -> dict[str, str]:
    return {name: run([gcc, f"-print-prog-name={name}"]).output.strip() for name in GCC_PARTS}
