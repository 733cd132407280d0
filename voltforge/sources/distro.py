"""What the distribution under this machine gives: its archive's mirrors, its name, how it installs a package."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from voltforge.sources.index import local_path
from voltforge.system.process import ProgramFailed, run

INSTALLERS = (
    ("apt-get", "apt-get install --yes --no-install-recommends"),
    ("dnf", "dnf install --assumeyes"),
    ("microdnf", "microdnf install --assumeyes"),
    ("zypper", "zypper --non-interactive install"),
    ("pacman", "pacman -S --noconfirm --needed"),
    ("apk", "apk add"),
)


def mirrors(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The base URLs, without a slash at the end, below which the archive's ``pool/`` may be: as apt is configured.

    Each once, those of one scheme in apt's order. Archives of security updates alone are left out: they do not
    hold the release's own files. Nothing without apt. They may hold credentials.
    """
    # `apt-get indextargets` would be the tool for this, but it lists nothing before the first `apt-get update`.
    # This prints what such an update would ask for, from either form of sources, as any user, and asks for nothing.
    # Apt lists its queues from last to first, so all hosts of a scheme are put into one (apt.conf(5), Queue-Mode).
    bases: dict[str, None] = {}
    for line in _asked(["apt-get", "update", "--print-uris", "-o", "Acquire::Queue-Mode=access"], environ):
        match = re.match(r"'([^']+?)/dists/([^']+)/InRelease'", line)
        if match and not re.search(r"-security$|/updates$", match[2]):
            bases.update(dict.fromkeys(_expanded(match[1])))
    return tuple(bases)


def proxies(url: str, environ: Mapping[str, str] = os.environ) -> dict[str, str | None] | None:
    """The proxies that apt uses for ``url``, as requests takes them; ``None`` where apt has no opinion.

    apt.conf(5): ``Acquire::http::Proxy``, ``Acquire::http::Proxy::<host>``, ``DIRECT`` for none, and https takes
    http's where it has none of its own.
    """
    settings: dict[str, str] = {}
    for line in _asked(["apt-config", "dump", "--format", "%f %v%n", "Acquire"], environ):
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
    """What the distribution calls itself (os-release(5)), or the kernel's name where it does not say."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return platform.system()
    return release.get("PRETTY_NAME") or release["NAME"]


def codename() -> str:
    """The release's name in the archive, such as ``bookworm``; nothing where os-release(5) does not have one."""
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    except OSError:
        return ""


def install_command(packages: Sequence[str], environ: Mapping[str, str] = os.environ) -> str:
    """The command with which a person installs ``packages`` here; a plain sentence where no installer is known."""
    words = shlex.join(packages)
    for program, command in INSTALLERS:
        if shutil.which(program, path=environ.get("PATH", "")):
            return f"{command} {words}" if os.geteuid() == 0 else f"sudo {command} {words}"
    return f"install {words} with your distribution's package manager"


def _asked(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    try:
        return run(argv, env=environ, timeout=60).output.splitlines()
    except ProgramFailed:
        return []


def _expanded(base: str) -> list[str]:
    """The base URLs behind one of apt's: itself, or those that a ``mirror+file:`` names (apt-transport-mirror(1))."""
    if base.startswith(("http://", "https://", "file:")):
        return [base]
    if not base.startswith("mirror+file:"):
        return []  # cdrom:, tor+http:, …: nothing that can be asked for a file here
    listing = local_path(base.partition("+")[2])
    try:
        lines = Path(listing or "").read_text().splitlines()
    except OSError:
        return []
    named = [line.split()[0].rstrip("/") for line in lines if line.strip()]
    return [url for url in named if url.startswith(("http://", "https://", "file:"))]
