"""The cache of compiled objects: ccache in front of the compilers, with a cache on this disk and one on a server.

ccache was chosen over sccache: it recognizes nvcc's objects by sources and headers without running the preprocessor,
supports the options that make objects reproducible, and stores the compiler's output unchanged (docs/speed.md has
figures).
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from voltforge.compile import s3, tunnel
from voltforge.compile.costs import Estimates
from voltforge.compile.farm import Farm
from voltforge.compile.sandbox import SYSTEM
from voltforge.compile.scheduler import socket_address
from voltforge.errors import VoltforgeError
from voltforge.system import console, files
from voltforge.system.process import run
from voltforge.system.urls import redacted

OFF = "off"
SCHEMES = {"redis": 6379, "http": 80, s3.SCHEME: 443}
"""The protocols of ccache 4.7 that need no further library, with their default ports. WebDAV is http.

An S3 bucket is served to ccache as WebDAV.
"""
RELAY = Path(tunnel.__file__)
SOCKET = f"objects-{os.getpid()}"
"""The socket in the scheduler's folder that leads to the server; one for each process of a run."""
PORT = 4226
"""The address of the server inside a sandbox without network."""
PATIENCE = 5.0
"""Seconds for a server to answer."""
STRIKES = 3
"""After so many failures in a row a server is not used again in this run."""
HEADERS = (".h", ".hpp", ".hh", ".hxx", ".cuh", ".inc", ".inl", ".ipp", ".def", ".tcc")
"""The file name endings of headers; those of C++'s own headers have no dot."""
GENERATORS = ("CMakeLists.txt", ".cmake", ".in")
SYSTEM_HEADERS = (Path("/usr/include"), Path("/usr/local/include"))
LIMIT = "10G"
"""The size limit of the cache on this disk; ccache removes the least recently used objects."""
OLDEST = (4, 7)
"""The first version of ccache that reads CCACHE_REMOTE_STORAGE."""
_HITS = re.compile(r"(direct|preprocessed)_cache_hit")


@dataclass(frozen=True)
class Found:
    """The use of the cache in one build."""

    hits: int = 0
    misses: int = 0
    shared: int = 0
    """Hits from the server that this disk did not have."""
    saved: float = 0.0
    """Seconds of compiling that the hits saved, by the last compilation of the same objects here."""

    def __str__(self) -> str:
        server = f", {self.shared} of them from the server" if self.shared else ""
        seconds = f", {self.saved:.0f} s of compiling saved" if self.saved else ""
        return f"objects from the cache: {self.hits} of {self.hits + self.misses}{server}{seconds}"


@dataclass(frozen=True)
class Server:
    """A server that keeps objects for several machines."""

    address: str
    """The address, as given or normalized: ``redis://host``, ``http://host/folder``."""
    host: str
    port: int
    kept_in: str = ""
    """The bucket behind a server that this process runs: ``s3://bucket/folder``."""

    @classmethod
    def parse(cls, address: str) -> Server:
        """Parse the address of a server.

        Raises:
            VoltforgeError: ccache does not support it.
        """
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in SCHEMES or not parts.hostname or "|" in address or " " in address:
            raise VoltforgeError(
                f"ccache={redacted(address)} is not the address of an object cache",
                hint="ccache=redis://host:6379, =http://host/folder (WebDAV), =s3://bucket/folder, or =off",
            )
        user, _, place = parts.netloc.rpartition("@")
        if parts.scheme == "redis" and user and not (":" in user and user.split(":")[0]):
            # redis writes a bare password with a colon before it, ccache without; redis 6 has a user name for it.
            address = parts._replace(netloc=f"default:{user.removeprefix(':')}@{place}").geturl()
        return cls(address, parts.hostname, port or SCHEMES[parts.scheme])

    def opened(self) -> Server:
        """Return the server in a form that ccache can reach: for a bucket, a WebDAV server of this process.

        Raises:
            VoltforgeError: the bucket cannot be reached.
        """
        if urlsplit(self.address).scheme != s3.SCHEME:
            return self
        return replace(Server.parse(s3.served(self.address)), kept_in=self.address)

    def seen(self, host: str, port: int) -> str:
        """Return the value of ccache's variable for a build that sees the server at another place."""
        parts = urlsplit(self.address)
        user = parts.netloc.rpartition("@")[0]
        flat = "|layout=flat" if self.kept_in else ""  # a bucket needs no folders
        return parts._replace(netloc=f"{user + '@' if user else ''}{host}:{port}").geturl() + flat

    def farm(self) -> Farm | None:
        """The farm of hosts at this server; ``None`` for WebDAV, which cannot coordinate them."""
        return Farm(self.address) if self.address.startswith("redis:") else None

    def __str__(self) -> str:
        return redacted(self.kept_in or self.address)


@dataclass
class Objects:
    """The object cache of a checkout."""

    program: Path
    """The path of ccache."""
    folder: Path
    """The cache on this disk."""
    server: Server | None = None
    _strikes: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _doors: set[Path] = field(default_factory=set)

    def log(self, package: str, cache: Path | None = None) -> Path:
        """The log of ccache for a package, in the folder of the cache as the build sees it."""
        return (cache or self.folder) / f"{package}.stats"

    def variables(self, package: str, surroundings: str, cache: Path, server: str) -> dict[str, str]:
        """Return the variables for the launcher and ccache, given the place where a build sees the cache.

        ``surroundings`` is the digest of everything that an object depends on besides its command and the headers that
        were read: the toolchain, of which ccache checks nvcc only, and the names of all headers. A new header that
        hides another one, or that ``__has_include`` finds, would go unnoticed otherwise.
        """
        return {
            "VOLTFORGE_CCACHE": str(self.program),
            "CCACHE_CONFIGPATH": "/dev/null",
            "CCACHE_DIR": str(cache),
            "CCACHE_MAXSIZE": LIMIT,
            "CCACHE_COMPILERCHECK": f"string:{surroundings}",
            "CCACHE_DEPEND": "1",  # depend mode: the compiler lists the headers, no preprocessor runs
            "CCACHE_SLOPPINESS": "include_file_ctime",  # a new hard link changes the ctime of a header
            "CCACHE_STATSLOG": str(self.log(package, cache)),
            **(
                {
                    "CCACHE_REMOTE_STORAGE": f"{server}|operation-timeout={int(PATIENCE * 1000)}",
                    "CCACHE_RESHARE": "1",  # other hosts wait for objects that the server lost
                }
                if server
                else {}
            ),
        }

    @cached_property
    def farm(self) -> Farm | None:
        """The farm of hosts that share the server, one for all builds of a run."""
        return self.server.farm() if self.server else None

    def lead(self, folder: Path) -> None:
        """Forward connections of the socket in ``folder`` to the server until this process ends."""
        if folder in self._doors:
            return
        self._doors.add(folder)
        files.write(folder / RELAY.name, RELAY.read_bytes())
        files.remove(folder / SOCKET)
        door = socket.socket(socket.AF_UNIX)
        with socket_address(folder, SOCKET) as address:
            door.bind(address)
        door.listen(128)
        threading.Thread(target=self._serve, args=(door,), name="objects", daemon=True).start()

    def reachable(self) -> bool:
        """Return True if the server accepts connections; report it otherwise."""
        if not self.server:
            return False
        try:
            self._connected().close()
        except (OSError, UnicodeError) as error:  # not a valid host name
            why = getattr(error, "strerror", None) or error
            console.warn(f"{self.server} cannot be reached ({why}): only the cache on this disk is used")
            return False
        return True

    def _connected(self) -> socket.socket:
        assert self.server
        return socket.create_connection((self.server.host, self.server.port), timeout=PATIENCE)

    def _serve(self, door: socket.socket) -> None:
        while True:
            one, _ = door.accept()
            threading.Thread(target=self._carry, args=(one,), daemon=True).start()

    def _carry(self, one: socket.socket) -> None:
        """Connect a client to the server, unless the server failed too often: each failure delays a compiler."""
        if self._strikes >= STRIKES:
            one.close()
            return
        try:
            other = self._connected()
        except (OSError, UnicodeError):
            one.close()
            fine = False
        else:
            other.settimeout(None)  # ccache compiles between two requests
            fine = tunnel.join(one, other)
        with self._counting:
            self._strikes = 0 if fine else self._strikes + 1
            out = self._strikes == STRIKES
        if out:
            console.warn(f"{self.server} did not answer {STRIKES} times in a row and is not used again in this run")


def named(setting: str) -> Server | None:
    """Return the server that ``ccache=`` names, if any.

    Raises:
        VoltforgeError: it is not the address of a server.
    """
    return Server.parse(setting) if setting not in ("", OFF) else None


def chosen(setting: str, folder: Path) -> Objects | None:
    """Return the cache for ``ccache=``: on this disk if it is empty; ``None`` if it is off or ccache is not installed.

    Raises:
        VoltforgeError: it is not the address of a server.
    """
    if setting == OFF:
        return None
    server = named(setting)
    program = shutil.which("ccache")
    if not program or not any(Path(program).is_relative_to(place) for place in SYSTEM):
        if server:
            console.warn(f"{server} is not used: ccache is not installed; ./doit doctor prints how to install it")
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        console.warn(f"{folder} cannot be written ({error.strerror}): everything is compiled")
        return None
    made = Objects(Path(program), folder, server)
    if server and (version := _version(made.program)) < OLDEST:
        console.warn(f"{server} is not used: ccache {'.'.join(map(str, version))} is older than 4.7")
        return Objects(made.program, folder)
    try:
        made.server = server and server.opened()
    except VoltforgeError as error:
        console.warn(f"{error.what}: only the cache on this disk is used")
        return Objects(made.program, folder)
    return made if made.reachable() else Objects(made.program, folder)


def names(folders: Iterable[Path]) -> str:
    """Return the digest of the names of all headers in some folders, and of the content of CMake's files."""
    found: list[str] = []
    for number, folder in enumerate(folders):
        for parent, _, entries in os.walk(folder):
            place = f"{number}:{os.path.relpath(parent, folder)}"
            found += [f"{place}/{one}" for one in entries if one.endswith(HEADERS) or "." not in one]
            found += [f"{place}/{files.sha256(Path(parent, one))}" for one in entries if one.endswith(GENERATORS)]
    return files.digest(sorted(found))


def _version(program: Path) -> tuple[int, ...]:
    said = re.search(r"([0-9]+)\.([0-9]+)", run([program, "--version"], ok=range(256)).output)
    return tuple(int(part) for part in said.groups()) if said else (0,)


def found(log: Path, needs: Estimates | None) -> Found:
    """Parse ccache's log of one build: for each source a line ``# path``, then the result.

    Trial compilations of CMake are skipped: some use a folder with a random name.
    """
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return Found()
    counts: Counter[str] = Counter()
    saved, source, known = 0.0, "", needs.measured() if needs else {}
    seconds = {Path(name).name: need.seconds for name, need in known.items()}
    for line in lines:
        if line.startswith("# "):
            source = "" if "CMake" in line else Path(line[2:]).name
        elif not source:
            continue
        elif _HITS.fullmatch(line):
            counts["hits"] += 1
            saved += seconds.get(f"{source}.o", 0.0)
        else:
            counts[line] += 1
    return Found(counts["hits"], counts["cache_miss"], counts["remote_storage_hit"], round(saved, 1))
