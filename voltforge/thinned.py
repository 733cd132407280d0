"""A package that is a stock wheel without the device code of other archs."""

from __future__ import annotations

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from voltforge import console, elf, environment, files, thin, wheel
from voltforge.checkout import Checkout
from voltforge.errors import VoltforgeError
from voltforge.package import Package, file_stands
from voltforge.process import run
from voltforge.recipe import Source, ThinRecipe
from voltforge.stage import Stage, Values

TOOLS = ("gcc", "strip", "patchelf")
"""The programs that write a part of the wheel."""


class Thinned(Package):
    """The stages of a recipe with wheels."""

    def __init__(self, checkout: Checkout, recipe: ThinRecipe, toolkit: Stage) -> None:
        super().__init__(checkout, toolkit)
        self.recipe: ThinRecipe = recipe

    def making(self, kept: Stage) -> dict[str, Stage]:
        """``build`` alone."""
        return {"build": self.planned("build", self.made_of, self._thin, file_stands, ("fetch",), kept)}

    def made_of(self) -> Values:
        """The stock wheel, what is done to it, and the tools that do it."""
        tools = {tool: run([elf.tool(tool, f"install {tool}"), "--version"]).output.splitlines()[0] for tool in TOOLS}
        return {
            **self.fetched_by(),
            "arch": list(self.recipe.arch),
            "thin": self.recipe.thin.model_dump(mode="json"),
            "tools": tools,
            "compression": wheel.DEFLATE,
        }

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
        made = thin.thin_wheel(stock, folder, self.recipe.arch, special=self.recipe.thin)
        console.note(f"{made.name}, {files.size(made.stat().st_size)} of {files.size(stock.stat().st_size)}")
        return {"path": str(made), "sha256": files.sha256(made), "linked": None}
