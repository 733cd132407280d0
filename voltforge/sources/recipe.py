"""Load recipes from ``recipes/*.toml`` and check them: all problems are reported at once, unknown keys refused."""

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
"""The placeholders ``{…}`` that a build variable may contain.

The recipe's version and archs, the toolkit's tag (``cu124``), the paths of the environment and its site-packages in
the build, and the flags for each nvcc (for projects that set CMAKE_CUDA_FLAGS, so that CMake ignores CUDAFLAGS).
"""
CHOICES = {"torch": "thin", "cudnn": "1"}
"""The choices of the command line, ``name=value``, with their defaults."""
SOURCE = "source"
"""The variant that is compiled. Other variants are part of the recipe's file name: ``torch-thin.toml``."""


class RecipeError(VoltforgeError):
    """A recipe with mistakes; ``problems`` holds all of them, each with its key."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__(
            f"{path} cannot be used:{listed(problems)}", hint="correct these keys; docs/recipes.md describes all keys"
        )
        self.path = path
        self.problems = problems


def byte_count(text: Any) -> int:
    """Return the bytes of a size with a unit: ``20 MB``, ``1.5 GiB``.

    Raises:
        ValueError: ``text`` is not a size, or the size is 0.
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
        raise ValueError("has a single brace; write `{{` or `}}` for a literal brace") from None
    for name, form, conversion in fields:
        if name not in PLACEHOLDERS or form or conversion:
            known = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
            raise ValueError(f"has a placeholder that is none of {known}; write `{{{{` or `}}}}` for a literal brace")
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
"""A pattern of file names (fnmatch(3))."""
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Setting = Annotated[str, Field(pattern=r"^[^=\x00]+$")]
Word = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""An argument of a program."""
Template = Annotated[str, Field(pattern=r"^[^\x00]*$"), AfterValidator(_template)]
"""The value of a variable; may contain :data:`PLACEHOLDERS`."""
Symbol = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Runpath = Mapping[Pattern, tuple[Annotated[str, Field(pattern=r"^\$ORIGIN(/|$)")], ...]]
"""RUNPATH entries by the pattern of the binary's path in the wheel; each begins with ``$ORIGIN``."""


class RecipeTable(BaseModel):
    """A table of a recipe: immutable, without undeclared keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Source(RecipeTable):
    """A file, its hash and its place of publication. Mirrors and the downloads folder are always tried first."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+~!%@-]{0,199}$")]
    """Its published name."""
    sha256: Digest
    size: Annotated[int, Field(gt=0, strict=True)] | None = None
    """Bytes, if known; a longer download is aborted."""
    index: Name | None = None
    """Its project on the configured package index."""
    url: Annotated[str, Field(pattern=r"^https?://[^\s/]+/\S+$")] | None = None
    """Its upstream URL."""
    pool: Annotated[RelativePath, Field(pattern=r"^pool/\S+$")] | None = None
    """Its path in the archive of the Linux distribution, below the mirrors that the machine is configured for."""

    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """The git commit of its content, for the receipt."""
    otherwise: str = ""
    """An addition to the message if the file cannot be fetched."""

    @model_validator(mode="after")
    def _has_one_place(self) -> Source:
        if sum(place is not None for place in (self.index, self.url, self.pool)) != 1:
            raise ValueError("needs exactly one of index, url and pool")
        return self

    @property
    def artifact(self) -> Artifact:
        """The file for :mod:`voltforge.sources.fetch`."""
        return Artifact(**self.model_dump(exclude={"commit", "otherwise"}))


class Heavy(RecipeTable):
    """The measured cost of compiling some objects, for machines that have not compiled them yet."""

    seconds: Annotated[float, Field(gt=0, lt=10**6)]
    memory: Size
    """The peak memory of all its processes together."""


class BuildSettings(RecipeTable):
    """Settings of the compilation."""

    lock: RelativePath
    """The lock of the build environment, relative to the recipe."""
    env: Mapping[Variable, Template] = {}
    """Environment variables; :data:`PLACEHOLDERS` are filled in."""
    options: tuple[Pattern, ...] = ()
    """Patterns of source files that declare the variables; an undeclared variable is refused."""
    links: tuple[Pattern, ...] = ()
    """Patterns of folders in site-packages whose libraries get links with unversioned names for the linker."""
    config_settings: Mapping[Setting, Word] = {}
    """Settings for the build backend (PEP 517), as in ``pip --config-settings``."""
    memory_per_job: Size = byte_count("1.5 GiB")
    """The expected peak memory of a compile job; limits the number of jobs by the free memory."""
    heavy: Mapping[Pattern, Heavy] = {}
    """Expensive objects, by patterns of their paths: they start first, and not at the same time."""

    def variables(self, **values: str) -> dict[str, str]:
        """Return the build's variables with the placeholders filled in."""
        return {key: value.format(**values) for key, value in self.env.items()}


class Finish(RecipeTable):
    """Changes of the compiled wheel."""

    runpath: Runpath = {}
    """RUNPATH entries by the pattern of the binary's path."""


class Stub(RecipeTable):
    """A library that is replaced by a stub, which exports the symbols that the wheel's binaries import."""

    folder: RelativePath
    """The stub's folder in the wheel; the RUNPATH of the importing binaries must contain it."""
    why: str
    """The end of the message, after the library's name, when a function without an answer is called."""
    prefix: str = ""
    """Prefix of the symbols imported from it; not needed for a library of the wheel itself."""
    answers: Mapping[Symbol, int] = {}
    """Functions that return this value instead of ending the program."""
    since: Arch | None = None
    """The lowest compute capability that it has code for; it is not replaced if the recipe has such an arch."""
    requirement: Name | None = None
    """The requirement that is removed from the wheel."""
    lines: Mapping[RelativePath, str] = {}
    """A line to remove from a text file, by the file's path; it must occur once. Surrounding spaces are ignored."""


class Thin(RecipeTable):
    """Changes of this project's wheel besides the removal of device code."""

    drop: tuple[Pattern, ...] = ()
    """Patterns of files to remove; each must match."""
    stubs: Mapping[Pattern, Stub] = {}
    """By SONAME."""
    version: RelativePath | None = None
    """The Python file with ``__version__``."""
    arch_list: RelativePath | None = None
    """The binary with the list of archs as a string, separated by spaces."""
    runpath: Runpath = {}
    """RUNPATH entries by the pattern of the binary's path."""


class Expect(RecipeTable):
    """Checks of the finished wheel."""

    lock: RelativePath
    """The lock of the environment for the import checks, relative to the recipe."""
    extensions: tuple[RelativePath, ...] = ()
    """Extension modules that it must contain."""
    absent: tuple[Pattern, ...] = ()
    """Patterns that no path of a binary and no name of a kernel may match."""
    requires: tuple[RequirementText, ...] = ()
    """Requirements that its metadata must contain, as written there."""
    requires_not: tuple[Name, ...] = ()
    """Projects that its metadata must not require."""
    imports: tuple[Module, ...] = ()
    """Modules that must be importable in a fresh environment without a GPU."""
    ops: RelativePath | None = None
    """A file of torch operators, one ``namespace::name`` a line, that the imports must register."""
    config: str | None = None
    """A Python expression for text with ``NAME=VALUE`` pairs, which must agree with the build's variables."""
    says: Mapping[str, str] = {}
    """Python expressions, each with the pattern (fnmatch(3)) that its value's text must match."""
    max_size: Size | None = None
    """Its maximum size, with a unit."""


class Recipe(RecipeTable):
    """The settings of a package that both kinds of recipe share."""

    name: Name
    version: VersionText
    variant: Annotated[str, Field(pattern=r"^[a-z]+$")] = SOURCE
    """A way to make the package; ``<name>=<variant>`` on the command line selects it."""
    summary: str = ""
    """A sentence for ``./doit list``."""
    arch: tuple[Arch, ...] = ()
    """Compute capabilities of the device code; empty for a package without device code."""
    expect: Expect

    path: Path = Field(exclude=True)
    """The recipe's file."""
    conditions: tuple[str, ...] = Field(default=(), exclude=True)
    """The choices that change the recipe: ``cudnn=0``."""

    @property
    def variables(self) -> dict[str, str]:
        """Values of the placeholders ``version`` and ``arch``; the toolchain adds the others."""
        return {"version": self.version, "arch": ";".join(self.arch)}

    def beside(self, relative: str) -> Path:
        """Return the path of a file that is named relative to the recipe."""
        return self.path.parent / relative


class SourceRecipe(Recipe):
    """A package that is compiled from source."""

    source: Source
    build: BuildSettings
    finish: Finish = Finish()


class ThinRecipe(Recipe):
    """A stock wheel from which the device code of other archs is removed."""

    arch: Annotated[tuple[Arch, ...], Field(min_length=1)]
    wheels: Annotated[tuple[Source, ...], Field(min_length=1)]
    """The stock wheel for each Python."""
    thin: Thin = Thin()


class Provision(RecipeTable):
    """A compiler to download: its archives, and the wheels with headers and libraries of the same release."""

    version: VersionText
    """nvcc's own version."""
    lock: RelativePath
    archives: Annotated[tuple[Source, ...], Field(min_length=1)]


class CudaRecipe(RecipeTable):
    """The CUDA toolkits that can compile for the recipes' archs, and two that can be downloaded."""

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
        """Return the path of a file that is named relative to the recipe."""
        return self.path.parent / relative


Model = TypeVar("Model", SourceRecipe, ThinRecipe, CudaRecipe)


def load(path: Path, choices: Mapping[str, str] = CHOICES) -> SourceRecipe | ThinRecipe:
    """Return the package recipe at ``path``, merged with the ``[when]`` tables of ``choices``.

    Raises:
        RecipeError: the file cannot be read, is not TOML, or breaks a rule, with these or other choices; the error
            names each faulty key.
    """
    data = _read(path)
    when = data.pop("when", {})
    _refuse(path, _misconditioned(when))
    data["conditions"] = tuple(when)
    plain = _package(path, data)
    for condition, table in when.items():
        _package(path, _merged(data, table), f"when.{condition}.")
        if condition in {f"{name}={value}" for name, value in choices.items()}:
            plain = _package(path, data := _merged(data, table))
    return plain


def load_all(folder: Path, choices: Mapping[str, str] = CHOICES) -> dict[str, SourceRecipe | ThinRecipe]:
    """Return the package recipes of a folder that ``choices`` select, by project name, in alphabetical order.

    Raises:
        RecipeError: a recipe has problems; the error names all problems of the first such file.
        VoltforgeError: no recipe has one of the choices.
    """
    recipes = [load(path, choices) for path in sorted(folder.glob("*.toml")) if path.stem != "cuda"]
    picked = {recipe.name: recipe for recipe in recipes if recipe.variant == choices.get(recipe.name, SOURCE)}
    used = {choice for recipe in picked.values() for choice in (f"{recipe.name}={recipe.variant}", *recipe.conditions)}
    for name, value in choices.items():
        if value != CHOICES.get(name) and f"{name}={value}" not in used:
            offered = [f"{recipe.name}={recipe.variant}" for recipe in recipes if recipe.name in CHOICES]
            offered += [
                f"{choice} with {recipe.name}={recipe.variant}" for recipe in recipes for choice in recipe.conditions
            ]
            raise VoltforgeError(f"{name}={value} changes no recipe", hint=", ".join(offered) or "leave it out")
    return picked


def load_cuda(path: Path) -> CudaRecipe:
    """Return the toolkit recipe at ``path``; raises as :func:`load` does."""
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
        + _absent(
            recipe,
            {"driver": recipe.driver, **{f"{key}.lock": provision.lock for key, provision in provisions.items()}},
        ),
    )
    return recipe


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:  # a thousand nested brackets
        raise ValueError(str(error)) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        data = read_toml(path)
    except OSError as error:
        raise RecipeError(path, [f"cannot be read: {error.strerror}"]) from error
    except ValueError as error:  # invalid TOML or UTF-8, or a number of 5,000 digits
        raise RecipeError(path, [f"is not TOML: {error}"]) from error
    _refuse(path, [f"{key}: is not a key of a recipe" for key in ("path", "conditions") if key in data])
    return data


def _checked(model: type[Model], path: Path, data: Mapping[str, Any], prefix: str = "") -> Model:
    try:
        return model.model_validate({**data, "path": path})
    except ValidationError as error:
        raise RecipeError(path, [prefix + _message(problem) for problem in error.errors()]) from error


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


def _merged(data: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``data`` updated with ``table``: nested tables are merged, other values replaced."""
    laid = {key: _merged(data[key], value) if isinstance(value, dict) and isinstance(data.get(key), dict) else value
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


def _message(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"{key}: is not a key of a recipe"
    if problem["type"] == "missing":
        return f"{key}: is missing"
    message, given = problem["msg"].removeprefix("Value error, "), problem["input"]
    return f"{key}: {message}" if isinstance(given, dict) else f"{key}: {message} (it is {given!r:.100})"
