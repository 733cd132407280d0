"""A package that is a stock wheel without the device code of other archs."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Checkout
from voltforge.pipeline.package import Package, file_stands
from voltforge.pipeline.stage import Stage, Values
from voltforge.sources import environment, materials
from voltforge.sources.materials import Material
from voltforge.sources.recipe import Source, ThinRecipe
from voltforge.system import console, files, programs
from voltforge.system.process import run
from voltforge.wheel import thin

TOOLS = ("gcc", "strip", "patchelf")
"""The programs that write a part of the wheel."""
BEHIND = ("cc1", "as", "collect2", "ld")
"""Those that gcc runs, by the names that ``-print-prog-name`` knows."""


class Thinned(Package):
    """The stages of a recipe with wheels."""

    def __init__(self, checkout: Checkout, recipe: ThinRecipe, toolkit: Stage) -> None:
        super().__init__(checkout, toolkit)
        self.recipe: ThinRecipe = recipe

    def making(self, kept: Stage) -> dict[str, Stage]:
        """``build`` alone."""
        return {"build": self.planned("build", self.made_of, self.shared(self._thin), file_stands, ("fetch",), kept)}

    def made_of(self) -> Values:
        """The stock wheel, what is done to it, and the tools that do it."""
        return {
            **self.fetched_by(),
            "arch": list(self.recipe.arch),
            "thin": self.recipe.thin.model_dump(mode="json"),
            "tools": {name: files.sha256(path) for name, path in tools().items()},
            **self.written(),
        }

    def materials(self) -> list[Material]:
        """The stock wheel and the tools."""
        made_with = [Material(name, "compiler", sha256=(files.sha256(path),)) for name, path in tools().items()]
        return [materials.of_source(self.source), *made_with]

    @property
    def source(self) -> Source:
        """The stock wheel for the Python that runs.

        Raises:
            VoltforgeError: the recipe has none for it.
        """
        ours = set(sys_tags())
        for source in self.recipe.wheels:
            if not ours.isdisjoint(parse_wheel_filename(source.file)[3]):
                return source
        known = [source.file.split("-")[2] for source in self.recipe.wheels]
        raise VoltforgeError(
            f"{self.recipe.path.name} has no stock wheel for {environment.python_tag()} on this machine",
            hint=f"run a Python of {', '.join(known)}: VOLTFORGE_PYTHON=python3.X ./doit …",
        )

    def _thin(self, key: str) -> Values:
        stock = self.fetched()
        console.step(f"thin {stock.name} to {', '.join(self.recipe.arch)}")
        folder = self.checkout.scratch / "wheels" / f"{self.recipe.name}-{key[:12]}"
        made = thin.thin_wheel(stock, folder, self.recipe.arch, special=self.recipe.thin, complete=self.describe)
        console.note(f"{made.name}, {files.size(made.stat().st_size)} of {files.size(stock.stat().st_size)}")
        return {"path": str(made), "sha256": files.sha256(made), "linked": None}


def tools() -> dict[str, Path]:
    """All programs that write a part of the wheel, by name, with the links to them followed.

    Raises:
        ElfError: one is not installed.
    """
    found = {tool: programs.find(tool, f"install {tool}") for tool in TOOLS}
    found |= {name: shutil.which(path) or path for name, path in _behind(found["gcc"]).items()}
    return {name: Path(path).resolve() for name, path in found.items()}


@cache
def _behind(gcc: str) -> dict[str, str]:
    return {name: run([gcc, f"-print-prog-name={name}"]).output.strip() for name in BEHIND}
