"""The files that the image does not need, as docker/leave-out.toml lists them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from voltforge.errors import VoltforgeError, listed
from voltforge.sources.recipe import Pattern, RecipeTable, read_toml


class ImageError(VoltforgeError):
    """An image that cannot be assembled."""


class Omission(RecipeTable):
    """Files of a project that are not needed at run time."""

    project: Pattern
    patterns: Annotated[tuple[Pattern, ...], Field(min_length=1)]
    why: str

    def concerns(self, projects: set[str]) -> bool:
        """True if one of the projects matches."""
        return any(fnmatchcase(project, self.project) for project in projects)


class EntryPoints(RecipeTable):
    """Lines of a project's entry_points.txt that name omitted files."""

    project: Pattern
    lines: Annotated[tuple[str, ...], Field(min_length=1)]


class LeaveOut(RecipeTable):
    """The content of docker/leave-out.toml."""

    files: tuple[Omission, ...] = ()
    entry_points: tuple[EntryPoints, ...] = ()
    strip: tuple[Omission, ...] = ()
    """Binaries that lose their symbol tables and debug data; never NVIDIA's."""

    @classmethod
    def load(cls, path: Path) -> LeaveOut:
        """Read the file.

        Raises:
            ImageError: it cannot be read, or breaks a rule; all problems are named.
        """
        try:
            return cls.model_validate(read_toml(path))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
            raise ImageError(f"{path.name} cannot be used:{listed(problems)}") from error
        except (OSError, ValueError) as error:
            raise ImageError(f"{path.name} cannot be read: {error}") from error

    def dropped_lines(self, project: str) -> set[str]:
        """Return the lines of a project's entry_points.txt that are dropped."""
        return {line for entry in self.entry_points if entry.project == project for line in entry.lines}


def matching(omissions: Sequence[Omission], project: str, member: str) -> Omission | None:
    """Return the first omission that matches a file of a project; ``member`` is the path in its RECORD."""
    for omission in omissions:
        if fnmatchcase(project, omission.project) and any(
            fnmatchcase(member, pattern) for pattern in omission.patterns
        ):
            return omission
    return None
