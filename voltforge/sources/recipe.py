"""What is built, read from ``recipes/*.toml``: checked at load, every problem named at once, unknown keys refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, TypeVar

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import is_normalized_name
from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from voltforge.errors import VoltforgeError, listed
from voltforge.sources.fetch import Artifact

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
PLACEHOLDERS = ("version", "arch", "cuda", "environment", "site", "cudaflags")
"""What ``{…}`` in a build variable may name.

The recipe's version and archs, the toolkit's tag (``cu124``), the environment and its site-packages as the build sees
them, and the flags that every nvcc should have (for what sets CMAKE_CUDA_FLAGS itself and loses CUDAFLAGS so).
"""
CHOICES = {"torch": "thin", "cudnn": "1"}
"""What a person may choose of the recipes, as ``name=value``, with what is taken if nothing is said."""
SOURCE = "source"
"""The variant of a package that is compiled; others have their name in the recipe's file name: ``torch-thin.toml``."""


class RecipeError(VoltforgeError):
    """A recipe that cannot be used; ``problems`` holds all of them, each with its key."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__(
            f"{path} cannot be used:{listed(problems)}", hint="mend the keys named; docs/recipes.md lists all"
        )
        self.path = path
        self.problems = problems


def byte_count(text: Any) -> int:
    """The bytes that a size with its unit stands for: ``20 MB``, ``1.5 GiB``.

    Raises:
        ValueError: it is none, or nothing.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?(B|kB|MB|GB|KiB|MiB|GiB)", str(text))
    size = int(Fraction(match[1]) * UNITS[match[2]]) if match else 0
    if not size:
        raise ValueError("not a size such as '20 MB' or '1.5 GiB'")
    return size


def _name(text: str) -> str:
    if not is_normalized_name(text):
        raise ValueError("not a normalized project name (PEP 503: lower case, digits and single hyphens)")
    return text


def _version(text: str) -> str:
    try:
        Version(text)
    except InvalidVersion:
        raise ValueError("not a version (PEP 440)") from None
    return text


def _relative(text: str) -> str:
    if text in ("", ".") or text.startswith("/") or ".." in Path(text).parts:
        raise ValueError("not a path that stays inside its folder")
    return text


def _requirement(text: str) -> str:
    try:
        Requirement(text)
    except InvalidRequirement:
        raise ValueError("not a requirement (PEP 508)") from None
    return text


def _template(text: str) -> str:
    try:
        fields = [part[1:] for part in Formatter().parse(text) if part[1] is not None]
    except ValueError:
        raise ValueError("has a brace that stands alone; one that is meant is written twice") from None
    for name, form, conversion in fields:
        if name not in PLACEHOLDERS or form or conversion:
            known = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
            raise ValueError(f"has a placeholder that is none of {known}; a brace that is meant is written twice")
    return text


Size = Annotated[int, BeforeValidator(byte_count)]
"""Bytes, written with a unit: ``20 MB``, ``1.5 GiB``."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A hexadecimal SHA-256."""
Name = Annotated[str, AfterValidator(_name)]
VersionText = Annotated[str, AfterValidator(_version)]
Arch = Annotated[str, Field(pattern=r"^[1-9][0-9]*\.[0-9]$")]
"""A compute capability: ``7.0``."""
RelativePath = Annotated[str, Field(max_length=200), AfterValidator(_relative)]
RequirementText = Annotated[str, AfterValidator(_requirement)]
Module = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]
Pattern = Annotated[str, Field(min_length=1)]
"""Of file names, as fnmatch(3) has them."""
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Setting = Annotated[str, Field(pattern=r"^[^=\x00]+$")]
Word = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""What a program can be given on its command line."""
Template = Annotated[str, Field(pattern=r"^[^\x00]*$"), AfterValidator(_template)]
"""The value of a variable, in which the :data:`PLACEHOLDERS` stand for something."""
Symbol = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Runpath = Mapping[Pattern, tuple[Annotated[str, Field(pattern=r"^\$ORIGIN(/|$)")], ...]]
"""RUNPATH entries by the pattern of the binary's path in the wheel; each begins with ``$ORIGIN``."""


class RecipeTable(BaseModel):
    """A table of a recipe: immutable, and with no key that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Source(RecipeTable):
    """One file by its hash, and where it can be had; mirrors and the downloads folder are always asked first."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+~!%@-]{0,199}$")]
    """Its name, as it is published."""
    sha256: Digest
    size: Annotated[int, Field(gt=0, strict=True)] | None = None
    """Bytes, if known: a download that grows beyond it is stopped."""
    index: Name | None = None
    """A project on the configured package index that publishes it."""
    url: Annotated[str, Field(pattern=r"^https?://[^\s/]+/\S+$")] | None = None
    """An upstream address of the file itself."""
    pool: Annotated[RelativePath, Field(pattern=r"^pool/\S+$")] | None = None
    """A path in the archive of the Linux distribution, on whatever mirror the machine is configured for."""

    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """The git commit that it was made of, for the receipt."""
    otherwise: str = ""
    """What to say besides where it cannot be had."""

    @model_validator(mode="after")
    def _has_one_place(self) -> Source:
        if sum(place is not None for place in (self.index, self.url, self.pool)) != 1:
            raise ValueError("needs exactly one of index, url and pool")
        return self

    @property
    def artifact(self) -> Artifact:
        """The file as :mod:`voltforge.sources.fetch` asks for it."""
        return Artifact(**self.model_dump(exclude={"commit", "otherwise"}))


class Heavy(RecipeTable):
    """What some objects take to compile, as it was measured, for machines that have not compiled them yet."""

    seconds: Annotated[float, Field(gt=0, lt=10**6)]
    memory: Size
    """The most that its processes hold together."""


class BuildSettings(RecipeTable):
    """How the wheel is compiled."""

    lock: RelativePath
    """The hash-locked environment that it is compiled in, relative to the recipe."""
    env: Mapping[Variable, Template] = {}
    """Variables for the build; the :data:`PLACEHOLDERS` are filled in."""
    options: tuple[Pattern, ...] = ()
    """Files of the source, as patterns, that declare its variables; one that none declares is refused."""
    links: tuple[Pattern, ...] = ()
    """Folders in the environment's site-packages, as patterns, whose libraries get the names that linkers look for."""
    config_settings: Mapping[Setting, Word] = {}
    """Settings for the build backend (PEP 517), as ``pip --config-settings`` has them."""
    memory_per_job: Size = byte_count("1.5 GiB")
    """The most that one compile job is expected to hold at once; with the free memory it bounds the jobs."""
    heavy: Mapping[Pattern, Heavy] = {}
    """Objects that take more than others, by patterns of their paths: they start first, and not together."""

    def variables(self, **values: str) -> dict[str, str]:
        """The build's variables with the placeholders filled in."""
        return {key: value.format(**values) for key, value in self.env.items()}


class Finish(RecipeTable):
    """What is done to the wheel once it is compiled."""

    runpath: Runpath = {}
    """RUNPATH entries by the pattern of the binary's path."""


class Stub(RecipeTable):
    """A library that is replaced by one that exports as much as the wheel's binaries import, and does nothing."""

    folder: RelativePath
    """Where in the wheel it goes: where the importing binaries' run path finds it."""
    why: str
    """What is said when a function is called that has no answer, as the rest of a sentence about the library."""
    prefix: str = ""
    """How the names that are imported from it begin; of a library in the wheel itself they are known without."""
    answers: Mapping[Symbol, int] = {}
    """Functions that return this instead of ending the program."""
    since: Arch | None = None
    """The capability from which on it has code: it stays if such an arch is asked for."""
    requirement: Name | None = None
    """The project that the wheel no longer requires."""
    lines: Mapping[RelativePath, str] = {}
    """A line that goes from a text file, spaces around it aside, by the file's path; it must be there once."""


class Thin(RecipeTable):
    """What one project's wheel needs beyond what thinning does to every wheel."""

    drop: tuple[Pattern, ...] = ()
    """Files that go, as patterns of their paths; each must be there."""
    stubs: Mapping[Pattern, Stub] = {}
    """By SONAME."""
    version: RelativePath | None = None
    """The Python file that has ``__version__``."""
    arch_list: RelativePath | None = None
    """The binary that has the list of archs as a string, with spaces between them."""
    runpath: Runpath = {}
    """RUNPATH entries by the pattern of the binary's path."""


class Expect(RecipeTable):
    """What the finished wheel is held to."""

    lock: RelativePath
    """The hash-locked environment that it is installed and imported in, relative to the recipe."""
    extensions: tuple[RelativePath, ...] = ()
    """Extension modules that must be in it."""
    absent: tuple[Pattern, ...] = ()
    """Patterns of files that must not be in it."""
    requires: tuple[RequirementText, ...] = ()
    """Requirements that its metadata must have, as written there."""
    requires_not: tuple[Name, ...] = ()
    """Projects that its metadata must not require."""
    imports: tuple[Module, ...] = ()
    """Modules that must import in a fresh environment, without a GPU."""
    ops: RelativePath | None = None
    """A file of torch operators, a ``namespace::name`` a line, that those imports must register."""
    config: str | None = None
    """A Python expression whose text has ``NAME=VALUE`` pairs: variables of the build among them must agree."""
    says: Mapping[str, str] = {}
    """Python expressions, with the pattern (as fnmatch(3) has them) that the text of their value must match."""
    max_size: Size | None = None
    """The largest that it may be, with a unit."""


class Recipe(RecipeTable):
    """One package: what the wheel must be. Where it comes from is said by one of the two kinds of recipe."""

    name: Name
    version: VersionText
    variant: Annotated[str, Field(pattern=r"^[a-z]+$")] = SOURCE
    """One of several ways to the same package; ``<name>=<variant>`` on the command line picks it."""
    summary: str = ""
    """A sentence for ``./doit list``."""
    arch: tuple[Arch, ...] = ()
    """Compute capabilities of the device code; empty for a package without any."""
    expect: Expect

    path: Path = Field(exclude=True)
    """Where it was read from."""
    conditions: tuple[str, ...] = Field(default=(), exclude=True)
    """The choices that change it: ``cudnn=0``."""

    @property
    def variables(self) -> dict[str, str]:
        """What the placeholders stand for, but for the toolkit's tag, which the toolchain knows."""
        return {"version": self.version, "arch": ";".join(self.arch)}

    def beside(self, relative: str) -> Path:
        """A file that the recipe names, relative to itself."""
        return self.path.parent / relative


class SourceRecipe(Recipe):
    """A package that is compiled: where its source is and how it is built."""

    source: Source
    build: BuildSettings
    finish: Finish = Finish()


class ThinRecipe(Recipe):
    """A package that is a stock wheel without the device code of other archs."""

    arch: Annotated[tuple[Arch, ...], Field(min_length=1)]
    wheels: Annotated[tuple[Source, ...], Field(min_length=1)]
    """The stock wheel for each Python."""
    thin: Thin = Thin()


class Provision(RecipeTable):
    """A compiler that is fetched: its archives, and the wheels with the headers and libraries of the same release."""

    version: VersionText
    """nvcc's own version."""
    lock: RelativePath
    archives: Annotated[tuple[Source, ...], Field(min_length=1)]


class CudaRecipe(RecipeTable):
    """Which CUDA toolkits can build for the archs wanted, and two that can be fetched."""

    name: Literal["cuda"]
    at_least: VersionText
    below: VersionText
    below_because: str
    driver: RelativePath
    """The lock of the wheels with the ``cuda.h`` that the driver's stub is compiled from."""
    redist: Provision
    distro: Provision
    path: Path = Field(exclude=True)

    def beside(self, relative: str) -> Path:
        """A file that the recipe names, relative to itself."""
        return self.path.parent / relative


Model = TypeVar("Model", SourceRecipe, ThinRecipe, CudaRecipe)


def load(path: Path, choices: Mapping[str, str] = CHOICES) -> SourceRecipe | ThinRecipe:
    """The package recipe at ``path``, with the tables of ``[when]`` that hold for ``choices`` laid over it.

    Raises:
        RecipeError: the file cannot be read, is not TOML, or breaks a rule, be it only with other choices; it names
            every key at fault.
    """
    data = _read(path)
    when = data.pop("when", {})
    _refuse(path, _misconditioned(when))
    data["conditions"] = tuple(when)
    plain = _package(path, data)
    for condition, table in when.items():
        _package(path, _laid_over(data, table), f"when.{condition}.")
        if condition in {f"{name}={value}" for name, value in choices.items()}:
            plain = _package(path, data := _laid_over(data, table))
    return plain


def load_all(folder: Path, choices: Mapping[str, str] = CHOICES) -> dict[str, SourceRecipe | ThinRecipe]:
    """The package recipes of a folder that ``choices`` pick, by the project's name, in alphabetical order.

    Raises:
        RecipeError: for the first file with problems, naming all of its problems.
        VoltforgeError: a choice that no recipe has.
    """
    everything = [load(path, choices) for path in sorted(folder.glob("*.toml")) if path.stem != "cuda"]
    picked = {one.name: one for one in everything if one.variant == choices.get(one.name, SOURCE)}
    used = {choice for one in picked.values() for choice in (f"{one.name}={one.variant}", *one.conditions)}
    for name, value in choices.items():
        if value != CHOICES.get(name) and f"{name}={value}" not in used:
            offered = [f"{one.name}={one.variant}" for one in everything if one.name in CHOICES]
            offered += [f"{choice} with {one.name}={one.variant}" for one in everything for choice in one.conditions]
            raise VoltforgeError(f"{name}={value} changes no recipe", hint=", ".join(offered) or "leave it out")
    return picked


def load_cuda(path: Path) -> CudaRecipe:
    """The toolkit recipe at ``path``; raises as :func:`load` does."""
    recipe = _checked(CudaRecipe, path, _read(path))
    low, high = Version(recipe.at_least), Version(recipe.below)
    provisions = {"redist": recipe.redist, "distro": recipe.distro}
    problems = [] if low < high else [f"below: is {high}, which is not above at_least, {low}"]
    problems += [
        f"{key}.version: is {provision.version}, which is not from {low} up to {high}"
        for key, provision in provisions.items()
        if not low <= Version(provision.version) < high
    ]
    _refuse(
        path,
        problems
        + _absent(recipe, {"driver": recipe.driver, **{f"{key}.lock": one.lock for key, one in provisions.items()}}),
    )
    return recipe


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:  # of a thousand brackets
        raise ValueError(str(error)) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        data = read_toml(path)
    except OSError as error:
        raise RecipeError(path, [f"cannot be read: {error.strerror}"]) from error
    except ValueError as error:  # TOML's own, not UTF-8, a number of 5,000 digits
        raise RecipeError(path, [f"is not TOML: {error}"]) from error
    _refuse(path, [f"{key}: is not a key of a recipe" for key in ("path", "conditions") if key in data])
    return data


def _checked(model: type[Model], path: Path, data: Mapping[str, Any], prefix: str = "") -> Model:
    try:
        return model.model_validate({**data, "path": path})
    except ValidationError as error:
        raise RecipeError(path, [prefix + _said(problem) for problem in error.errors()]) from error


def _package(path: Path, data: Mapping[str, Any], prefix: str = "") -> SourceRecipe | ThinRecipe:
    recipe: SourceRecipe | ThinRecipe
    if "wheels" in data:
        recipe = _checked(ThinRecipe, path, data, prefix)
    else:
        recipe = _checked(SourceRecipe, path, data, prefix)
    named = {"expect.lock": recipe.expect.lock, "expect.ops": recipe.expect.ops}
    if isinstance(recipe, SourceRecipe):
        named = {"build.lock": recipe.build.lock, **named}
    plain = recipe.variant == SOURCE
    key, stem = ("name", recipe.name) if plain else ("name and variant", f"{recipe.name}-{recipe.variant}")
    misnamed = f"{key}: is {stem!r}, but the file is called {path.name}" if stem != path.stem else ""
    _refuse(path, [prefix + problem for problem in [*filter(None, [misnamed]), *_absent(recipe, named)]])
    return recipe


def _laid_over(data: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with the keys of ``table`` in place of its own; tables are laid over each other, all else replaced."""
    laid = {key: _laid_over(data[key], value) if isinstance(value, dict) and isinstance(data.get(key), dict) else value
            for key, value in table.items()}  # fmt: skip
    return {**data, **laid}


def _misconditioned(when: Any) -> list[str]:
    if not isinstance(when, dict):
        return ["when: is not a table of tables"]
    known = " or ".join(f"{name}=…" for name in CHOICES)
    return [
        f"when.{condition}: is not a table under a choice ({known})"
        for condition, table in when.items()
        if condition.count("=") != 1 or condition.split("=")[0] not in CHOICES or not isinstance(table, dict)
    ]


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise RecipeError(path, problems)


def _absent(recipe: Recipe | CudaRecipe, named: Mapping[str, str | None]) -> list[str]:
    files = {key: recipe.beside(file) for key, file in named.items() if file}
    return [f"{key}: there is no {file}" for key, file in files.items() if not file.is_file()]


def _said(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"{key}: is not a key of a recipe"
    if problem["type"] == "missing":
        return f"{key}: is missing"
    said, given = problem["msg"].removeprefix("Value error, "), problem["input"]
    return f"{key}: {said}" if isinstance(given, dict) else f"{key}: {said} (it is {given!r:.100})"
