"""The Linux distribution of this machine: its mirrors, proxies, name and package installer."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from voltforge.system.process import ProgramFailed, run
from voltforge.system.urls import local_path

INSTALLERS = (
    ("apt-get", "apt-get install --yes --no-install-recommends"),
    ("dnf", "dnf install --assumeyes"),
    ("microdnf", "microdnf install --assumeyes"),
    ("zypper", "zypper --non-interactive install"),
    ("pacman", "pacman -S --noconfirm --needed"),
    ("apk", "apk add"),
)


def mirrors(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the base URLs of apt's archives, without a trailing slash; ``pool/`` is below them.

    Each URL is listed once, those of one scheme in apt's order. Archives of security updates are left out, because
    they lack the release's own files. Empty without apt. The URLs may hold credentials.
    """
    # `apt-get indextargets` lists nothing before the first `apt-get update`. --print-uris prints the URLs of an update
    # without a request, for both formats of sources and any user. Apt prints its queues from last to first;
    # Queue-Mode=access has one queue for each scheme (apt.conf(5)).
    bases: dict[str, None] = {}
    for line in _output_lines(["apt-get", "update", "--print-uris", "-o", "Acquire::Queue-Mode=access"], environ):
        match = re.match(r"'([^']+?)/dists/([^']+)/InRelease'", line)
        if match and not re.search(r"-security$|/updates$", match[2]):
            bases.update(dict.fromkeys(_expanded(match[1])))
    return tuple(bases)


def proxies(url: str, environ: Mapping[str, str] = os.environ) -> dict[str, str | None] | None:
    """Return apt's proxies for ``url`` in the form of requests; ``None`` if apt has no proxy setting for it.

    apt.conf(5): ``Acquire::http::Proxy``, ``Acquire::http::Proxy::<host>``, ``DIRECT`` for none. https
    falls back to the setting of http.
    """
    settings: dict[str, str] = {}
    for line in _output_lines(["apt-config", "dump", "--format", "%f %v%n", "Acquire"], environ):
        key, _, value = line.partition(" ")
        if value:
            settings[key.lower()] = value
    parts = urlsplit(url)
    for scheme in dict.fromkeys((parts.scheme, "http")):
        for key in (f"acquire::{scheme}::proxy::{parts.hostname}", f"acquire::{scheme}::proxy"):
            if proxy := settings.get(key):
                return {parts.scheme: None if proxy == "DIRECT" else proxy}
    return None


def name() -> str:
    """Return the distribution's name (os-release(5)), or the kernel's without one."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return platform.system()
    return release.get("PRETTY_NAME") or release["NAME"]


def codename() -> str:
    """Return the release's name in the archive, such as ``bookworm``; empty if os-release(5) has none."""
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    except OSError:
        return ""


def install_command(packages: Sequence[str], environ: Mapping[str, str] = os.environ) -> str:
    """Return the command that installs ``packages`` here; a sentence if no installer is known."""
    words = shlex.join(packages)
    for program, command in INSTALLERS:
        if shutil.which(program, path=environ.get("PATH", "")):
            return f"{command} {words}" if os.geteuid() == 0 else f"sudo {command} {words}"
    return f"install {words} with your distribution's package manager"


def _output_lines(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    try:
        return run(argv, env=environ, timeout=60).output.splitlines()
    except ProgramFailed:
        return []


def _expanded(base: str) -> list[str]:
    """Return the base URL itself, or the URLs in the file of a ``mirror+file:`` URL (apt-transport-mirror(1))."""
    if base.startswith(("http://", "https://", "file:")):
        return [base]
    if not base.startswith("mirror+file:"):
        return []  # cdrom:, tor+http:, …: no file can be fetched over these
    listing = local_path(base.partition("+")[2])
    try:
        lines = Path(listing or "").read_text().splitlines()
    except OSError:
        return []
    named = [line.split()[0].rstrip("/") for line in lines if line.strip()]
    return [url for url in named if url.startswith(("http://", "https://", "file:"))]
