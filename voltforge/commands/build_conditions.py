"""Conditions that differ between a build and its repetition: user, umask, locale, time zone, jobs and others."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uv import find_uv_bin

from voltforge.compile import sandbox
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources.index import Indexes
from voltforge.system.process import ProgramFailed, run

CODE = ("dodo.py", "pyproject.toml", "volta", "voltforge")
DATA = ("requirements.txt", "recipes", "patches", "docker")
"""The data of a checkout that the second build gets, beside the code."""
UMASKS = ("0077", "0022")
LOCALES = ("tr_TR.UTF-8", "C", "C.UTF-8")
"""In Turkish the capital of i is not I, which has broken builds; not every machine has it installed."""
ZONES = ("NPT-5:45", "CST+6")
"""In POSIX notation (tzset(3)), which works without installed time zones."""
SEEDS = ("4242", "2424")
USERS = ("1234", "1235")
"""UMASKS to USERS are candidates: the second build uses the first that differs from the value of the first build."""
WITHHELD = ("VOLTFORGE_CACHE", "VOLTFORGE_KEY", "VOLTFORGE_TRUSTED", "FORCE_COLOR")
"""Variables that the second build does not get: it must compile, is not signed, and writes a plain log."""
CONFIGURATION = {
    "NETRC": ".netrc",
    "UV_CONFIG_FILE": ".config/uv/uv.toml",
    "DOCKER_CONFIG": ".docker",
    "CONTAINERS_REGISTRIES_CONF": ".config/containers/registries.conf",
}
"""Variables that name the configuration files in HOME, because the second build has another HOME."""


@dataclass(frozen=True)
class Variation:
    """A condition of the build."""

    what: str
    first: str
    """The value of the first build, from its record or from this process."""
    second: str
    same_because: str = ""
    """The reason why both builds have the same value; empty if the values differ."""


def variables(home: Path) -> dict[str, Variation]:
    """Return the environment variables that differ, by name; ``home`` is the second build's HOME."""
    spoken = next((os.environ[key] for key in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(key)), "C")
    known = _locales()
    other = next(name for name in LOCALES if _normal(name) in known and _normal(name) != _normal(spoken))
    zone, seed = os.environ.get("TZ", ""), os.environ.get("PYTHONHASHSEED", "")
    return {
        "LC_ALL": Variation("locale", spoken, other),
        "TZ": Variation("time zone", zone or "the system's", another(zone, ZONES)),
        "HOME": Variation("home", str(Path.home()), str(home)),
        "PYTHONHASHSEED": Variation("hash seed", seed or "random", another(seed, SEEDS)),
    }


def inherited_environment(pipeline: Pipeline) -> dict[str, str]:
    """Return the variables of this process that the second build needs to find mirrors, indexes and caches."""
    environ = {key: value for key, value in os.environ.items() if key not in WITHHELD}
    found = {key: Path.home() / file for key, file in CONFIGURATION.items() if (Path.home() / file).exists()}
    # The first build's downloads serve as a mirror; files from there are checked by hash like all others.
    mirrors = (pipeline.scratch / "downloads").absolute().as_uri(), environ.get("VOLTFORGE_MIRRORS", "")
    cache = run([find_uv_bin(), "cache", "dir"]).output.splitlines()[-1]
    return {
        **{key: str(path) for key, path in found.items()},
        **environ,
        **_configured(pipeline.store.indexes),
        "VOLTFORGE_MIRRORS": " ".join(mirrors).strip(),
        "UV_CACHE_DIR": cache,
        "NO_COLOR": "1",
    }


def _configured(indexes: Indexes) -> dict[str, str]:
    """Return the variables from which :func:`voltforge.sources.index.configured` reads the same indexes."""
    variables = {
        "UV_DEFAULT_INDEX": indexes.default,
        "UV_INDEX": " ".join(indexes.extra),
        "PIP_CERT": indexes.certificate,
    }
    variables |= {"UV_FIND_LINKS": ",".join(indexes.find_links), "UV_NO_INDEX": "" if indexes.default else "1"}
    return {key: value for key, value in variables.items() if value}


def other_user(pipeline: Pipeline, same_because: str) -> tuple[Variation, tuple[str, ...]]:
    """Return another user, and the command prefix that runs a program as that user in a user namespace (unshare(1))."""
    own = str(os.getuid())
    other = another(own, USERS)
    words = ("unshare", "--user", f"--map-user={other}", f"--map-group={other}", "--")
    if not same_because:
        inside = sandbox.choose(pipeline.settings.sandbox)
        try:
            run([*words, *inside.command(["true"], writable={}, readable={}, cwd=Path("/"))], timeout=20)
            return Variation("user", own, other), words
        except ProgramFailed:
            same_because = "unshare(1) cannot map another user on this machine"
    return Variation("user", own, own, same_because), ()


def name_order(checkout: Path, root: Path) -> Variation:
    """Compare the order in which the file system lists the names of a folder in both checkouts."""
    for folder in (name for name in (*CODE, *DATA) if (checkout / name).is_dir() and (root / name).is_dir()):
        both = set(os.listdir(checkout / folder)) & set(os.listdir(root / folder))
        first, second = ([name for name in os.listdir(place / folder) if name in both] for place in (checkout, root))
        if first != second:
            return Variation("order of names", f"{', '.join(first[:3])}, …", f"{', '.join(second[:3])}, …")
    return Variation("order of names", "as listed", "as listed", "this file system lists both in the same order")


def job_count(first: int | None) -> Variation:
    """Return the number of compile jobs of both builds; ``first`` is None if the package is not compiled."""
    if first is None:
        return Variation("jobs", "not counted", "not counted", "it is not compiled")
    return Variation("jobs", str(first), "1" if first > 1 else "2")


def umask_text() -> str:
    """Return the umask of this process in octal."""
    mask = os.umask(0o077)  # umask(2) returns the old mask only when it sets a new one
    os.umask(mask)
    return f"{mask:04o}"


def another(value: str, candidates: Sequence[str]) -> str:
    """Return the first candidate that is not ``value``."""
    return next(candidate for candidate in candidates if candidate != value)


def _locales() -> set[str]:
    """Return the locales of this machine; C and C.UTF-8 are part of every C library."""
    try:
        installed = run(["locale", "-a"]).output.split()
    except ProgramFailed:
        installed = []
    return {_normal(name) for name in ("C", "C.UTF-8", *installed)}


def _normal(name: str) -> str:
    """Return a locale's name as ``locale -a`` writes it."""
    return re.sub("utf-?8", "utf8", name, flags=re.IGNORECASE)


def moment(seconds: float) -> str:
    """Return a time in seconds since 1970 as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
