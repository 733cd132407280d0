"""The package indexes that pip and uv are configured for on this machine. Needs the standard library alone."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from voltforge.system.urls import local_path

NAME = "VOLTFORGE"
"""The prefix of index names for uv: uv reads an index's credentials from variables with its name."""


@dataclass(frozen=True)
class IndexSettings:
    """The configured package indexes. The addresses can hold credentials: print them with ``redacted``."""

    default: str | None = ""
    """The default index (simple repository API, PEP 503 or 691); ``None`` if pip or uv is configured to use none, empty
    if neither is configured.
    """
    extra: tuple[str, ...] = ()
    """Further indexes, on the web or as file:// URLs."""
    find_links: tuple[str, ...] = ()
    """Folders, or URLs of pages, that hold or link files of any project."""
    certificate: str | None = None
    """A file with the trusted certificate authorities (PEM)."""
    certificate_from: str = ""
    """The setting that named ``certificate``."""

    def uv_arguments(self) -> list[str]:
        """Return uv's options for these indexes; credentials go through ``uv_environment``, because command lines are
        logged.
        """
        # By default uv takes a project from the first index that has it, as a protection against dependency confusion.
        # Here every install is locked by hash, which protects as well, and an extra index often holds only some
        # versions of a project.
        arguments = ["--index-strategy", "unsafe-best-match"]
        if self.default is None:
            arguments.append("--no-index")
        elif self.default:
            arguments += ["--default-index", _named(0, self.default)]
        for number, url in enumerate(() if self.default is None else self.extra, 1):
            arguments += ["--index", _named(number, url)]
        if not any(_credentials(place) for place in self.find_links):
            for place in self.find_links:
                arguments += ["--find-links", place]
        return arguments

    def uv_environment(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Return the whole environment for uv: ``environ``, the certificates, and credentials if there are any."""
        replaced = (
            "UV_DEFAULT_INDEX",
            "UV_INDEX_URL",
            "UV_INDEX",
            "UV_EXTRA_INDEX_URL",
            "UV_FIND_LINKS",
            "UV_NO_INDEX",
        )
        variables = {name: value for name, value in environ.items() if name not in replaced}
        if self.certificate:
            variables["SSL_CERT_FILE"] = self.certificate
        for number, url in enumerate(self.indexes):
            if pair := _credentials(url):
                variables[f"UV_INDEX_{NAME}{number}_USERNAME"] = pair[0]
                variables[f"UV_INDEX_{NAME}{number}_PASSWORD"] = pair[1]
        if any(_credentials(place) for place in self.find_links):
            variables["UV_FIND_LINKS"] = ",".join(self.find_links)
        return variables

    @property
    def indexes(self) -> tuple[str, ...]:
        """The default index and the further ones; none if no index is used."""
        return () if self.default is None else (self.default, *self.extra)


def configured(environ: Mapping[str, str] = os.environ, python: str | Path | None = None) -> IndexSettings:
    """Return the package indexes that uv and pip are configured for.

    uv's variables override pip's, and pip's override its configuration files, which pip itself prints: the pip of
    ``python``, of the running interpreter, or of ``PATH``. Without pip the files are skipped. Extra indexes and
    find-links locations of both tools are combined.
    """
    pip = _pip_configuration(environ, python)

    def setting(variable: str, key: str) -> str:
        return environ.get(variable) or pip.get(key, "")

    default = environ.get("UV_DEFAULT_INDEX") or environ.get("UV_INDEX_URL") or setting("PIP_INDEX_URL", "index-url")
    extra = [environ.get("UV_INDEX", ""), environ.get("UV_EXTRA_INDEX_URL", "")]
    extra.append(setting("PIP_EXTRA_INDEX_URL", "extra-index-url"))
    links = [*environ.get("UV_FIND_LINKS", "").split(","), *setting("PIP_FIND_LINKS", "find-links").split()]
    without = any(_true(value) for value in (environ.get("UV_NO_INDEX", ""), setting("PIP_NO_INDEX", "no-index")))
    certificate, source = None, ""
    for variable in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        if not certificate and environ.get(variable):
            certificate, source = environ[variable], variable
    if not certificate and pip.get("cert"):
        certificate, source = pip["cert"], "pip's setting `cert`"
    return IndexSettings(
        default=None if without else _index(default, environ) if default else "",
        extra=_unique(_index(value, environ) for value in " ".join(extra).split()),
        find_links=_unique(_absolute(value.strip()) for value in links if value.strip()),
        certificate=certificate,
        certificate_from=source,
    )


def _named(number: int, url: str) -> str:
    return f"{NAME.lower()}{number}={_without_credentials(url)}" if _credentials(url) else url


def _credentials(url: str) -> tuple[str, str] | None:
    if local_path(url) is not None:
        return None
    user, at, _ = urlsplit(url).netloc.rpartition("@")
    name, _, password = user.partition(":")
    return (unquote(name), unquote(password)) if at else None


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _pip_configuration(environ: Mapping[str, str], python: str | Path | None) -> dict[str, str]:
    """Return pip's configuration by long option name, as `pip config list` prints it."""
    pythons = [str(python)] if python else [sys.executable, "python3", "python"]
    for argv in [*([name, "-m", "pip"] for name in pythons), ["pip"]]:
        try:
            done = subprocess.run(
                [*argv, "config", "list"], env=environ, capture_output=True, text=True, errors="replace", timeout=60
            )
        except (OSError, ValueError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return _parsed(done.stdout)
    return {}


def _parsed(printed: str) -> dict[str, str]:
    found: dict[str, dict[str, str]] = {}
    for line in printed.splitlines():
        # name='value', with the value as Python's repr; `:env:` lines are variables, read elsewhere.
        if match := re.fullmatch(r"(global|install|download)\.([\w-]+)=(['\"].*['\"])", line.strip()):
            section, key, value = match.groups()
            try:
                found.setdefault(section, {})[key] = str(ast.literal_eval(value))
            except (SyntaxError, ValueError):
                continue
    return {**found.get("global", {}), **found.get("download", {}), **found.get("install", {})}


def _index(value: str, environ: Mapping[str, str]) -> str:
    """Return an index's URL, from uv's ``name=URL`` with the credentials of that name's variables, or from a URL or
    path.
    """
    match = re.fullmatch(r"([\w.-]+)=(.+)", value)
    if not match:
        return value if "://" in value else Path(_absolute(value)).as_uri()
    name, url = re.sub(r"\W", "_", match[1]).upper().replace(".", "_"), match[2]
    user, password = (environ.get(f"UV_INDEX_{name}_{what}", "") for what in ("USERNAME", "PASSWORD"))
    if not (user or password) or "@" in urlsplit(url).netloc:
        return _index(url, {})
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{quote(user, safe='')}:{quote(password, safe='')}@{parts.netloc}"))


def _absolute(value: str) -> str:
    return value if "://" in value else str(Path(value).expanduser().absolute())


def _unique(values: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _true(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on", "y", "t")
