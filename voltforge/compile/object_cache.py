"""Objects that were compiled before: ccache in front of the compilers, on this disk, and on a server for many machines.

ccache, not sccache: it knows nvcc's objects by their sources and headers without running the preprocessor, takes the
options that make them reproducible, and stores what the compiler made as it made it (docs/speed.md has the figures).
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
from voltforge.sources.index import redacted
from voltforge.system import console, files
from voltforge.system.process import run

OFF = "off"
SCHEMES = {"redis": 6379, "http": 80, s3.SCHEME: 443}
"""What ccache 4.7 speaks without a network library of its own, and the port where none is named; WebDAV is http.

And a bucket of S3, which it is given as a WebDAV server.
"""
RELAY = Path(tunnel.__file__)
SOCKET = f"objects-{os.getpid()}"
"""The socket in the scheduler's folder that leads to the server, one for each process of a run."""
PORT = 4226
"""Where a sandbox without a network has the server."""
PATIENCE = 5.0
"""Seconds in which a server has to answer."""
STRIKES = 3
"""So many times in a row that a server does not answer, and it is not asked any more."""
HEADERS = (".h", ".hpp", ".hh", ".hxx", ".cuh", ".inc", ".inl", ".ipp", ".def", ".tcc")
"""How the names of what sources include end; those of C++'s own headers have no dot."""
GENERATORS = ("CMakeLists.txt", ".cmake", ".in")
SYSTEM_HEADERS = (Path("/usr/include"), Path("/usr/local/include"))
LIMIT = "10G"
"""The most that the local cache holds; ccache throws out what was used least recently."""
OLDEST = (4, 7)
"""The first ccache that calls a server CCACHE_REMOTE_STORAGE."""
_HITS = re.compile(r"(direct|preprocessed)_cache_hit")


@dataclass(frozen=True)
class Found:
    """What came from the cache in one build."""

    hits: int = 0
    misses: int = 0
    shared: int = 0
    """Hits that the server had, and not this disk."""
    saved: float = 0.0
    """Seconds that the compilers took for the same objects, when they were last compiled here."""

    def __str__(self) -> str:
        server = f", {self.shared} of them from the server" if self.shared else ""
        seconds = f", {self.saved:.0f} s of compiling saved" if self.saved else ""
        return f"objects from the cache: {self.hits} of {self.hits + self.misses}{server}{seconds}"


@dataclass(frozen=True)
class Server:
    """Where many machines keep objects."""

    address: str
    """As it was named, or as all understand it: ``redis://host``, ``http://host/folder``."""
    host: str
    port: int
    kept_in: str = ""
    """The bucket that it has its files in, ``s3://bucket/folder``, where it is one that this process runs."""

    @classmethod
    def parse(cls, address: str) -> Server:
        """The server of an address.

        Raises:
            VoltforgeError: it is none that ccache can be given.
        """
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in SCHEMES or not parts.hostname or "|" in address or " " in address:
            raise VoltforgeError(
                f"ccache={redacted(address)} is no server of objects",
                hint="ccache=redis://host:6379, =http://host/folder (WebDAV), =s3://bucket/folder, or =off",
            )
        user, _, place = parts.netloc.rpartition("@")
        if parts.scheme == "redis" and user and not (":" in user and user.split(":")[0]):
            # A password alone has a colon before it for redis, and none for ccache; redis 6 has a user for it.
            address = parts._replace(netloc=f"default:{user.removeprefix(':')}@{place}").geturl()
        return cls(address, parts.hostname, port or SCHEMES[parts.scheme])

    def opened(self) -> Server:
        """The same where ccache can ask it: for a bucket, a server of this process's own.

        Raises:
            VoltforgeError: the bucket cannot be reached.
        """
        if urlsplit(self.address).scheme != s3.SCHEME:
            return self
        return replace(Server.parse(s3.served(self.address)), kept_in=self.address)

    def seen(self, host: str, port: int) -> str:
        """What ccache is told where a build sees the server at another place."""
        parts = urlsplit(self.address)
        user = parts.netloc.rpartition("@")[0]
        flat = "|layout=flat" if self.kept_in else ""  # a bucket has no folders to make first
        return parts._replace(netloc=f"{user + '@' if user else ''}{host}:{port}").geturl() + flat

    def farm(self) -> Farm | None:
        """The hosts that meet at it; WebDAV has no words for claims."""
        return Farm(self.address) if self.address.startswith("redis:") else None

    def __str__(self) -> str:
        return redacted(self.kept_in or self.address)


@dataclass
class Objects:
    """The cache of a checkout."""

    program: Path
    """ccache."""
    folder: Path
    """What is on this disk."""
    server: Server | None = None
    _strikes: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _doors: set[Path] = field(default_factory=set)

    def log(self, package: str, cache: Path | None = None) -> Path:
        """Where ccache says what it did with each source of a package, in the cache's folder as it is seen."""
        return (cache or self.folder) / f"{package}.stats"

    def variables(self, package: str, surroundings: str, cache: Path, server: str) -> dict[str, str]:
        """What the launcher and ccache are told, given where a build sees the cache.

        ``surroundings`` stands for all that decides about an object besides its command and the headers that were
        read: the toolchain, of which ccache would look at nvcc alone; and headers that were *not* there. One that comes
        to lie before another, or that a ``__has_include`` asks for, ccache would not notice.
        """
        return {
            "VOLTFORGE_CCACHE": str(self.program),
            "CCACHE_CONFIGPATH": "/dev/null",
            "CCACHE_DIR": str(cache),
            "CCACHE_MAXSIZE": LIMIT,
            "CCACHE_COMPILERCHECK": f"string:{surroundings}",
            "CCACHE_DEPEND": "1",  # headers are those that the compiler names: no preprocessor for what is not there
            "CCACHE_SLOPPINESS": "include_file_ctime",  # another link to a header changes that, and nothing in it
            "CCACHE_STATSLOG": str(self.log(package, cache)),
            **(
                {
                    "CCACHE_REMOTE_STORAGE": f"{server}|operation-timeout={int(PATIENCE * 1000)}",
                    "CCACHE_RESHARE": "1",  # what this disk has and the server lost, other hosts wait for
                }
                if server
                else {}
            ),
        }

    @cached_property
    def farm(self) -> Farm | None:
        """The hosts that share the server, one for all builds of a run."""
        return self.server.farm() if self.server else None

    def lead(self, folder: Path) -> None:
        """Let what comes to the socket in ``folder`` reach the server, from now to the end of the process."""
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
        """Whether the server takes a connection; it is told where it does not."""
        if not self.server:
            return False
        try:
            self._connected().close()
        except (OSError, UnicodeError) as error:  # a name that is none of a host
            why = getattr(error, "strerror", None) or error
            console.warn(f"{self.server} cannot be reached ({why}): objects are those of this disk")
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
        """Join a connection to the server, unless that failed too often: each failure makes a compiler wait."""
        if self._strikes >= STRIKES:
            one.close()
            return
        try:
            other = self._connected()
        except (OSError, UnicodeError):
            one.close()
            fine = False
        else:
            other.settimeout(None)  # between two questions ccache compiles
            fine = tunnel.join(one, other)
        with self._counting:
            self._strikes = 0 if fine else self._strikes + 1
            out = self._strikes == STRIKES
        if out:
            console.warn(f"{self.server} did not answer {STRIKES} times in a row: it is not asked any more in this run")


def named(setting: str) -> Server | None:
    """The server that ``ccache=`` names, if it names one.

    Raises:
        VoltforgeError: it is no address of a server.
    """
    return Server.parse(setting) if setting not in ("", OFF) else None


def chosen(setting: str, folder: Path) -> Objects | None:
    """The cache that ``ccache=`` asks for: on this disk where it is empty; none if it is off or there is no ccache.

    Raises:
        VoltforgeError: it is no address of a server.
    """
    if setting == OFF:
        return None
    server = named(setting)
    program = shutil.which("ccache")
    if not program or not any(Path(program).is_relative_to(place) for place in SYSTEM):
        if server:
            console.warn(f"{server} is not asked, for there is no ccache here: ./doit doctor says what gets it")
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
        console.warn(f"{server} is not asked: ccache {'.'.join(map(str, version))} is older than 4.7")
        return Objects(made.program, folder)
    try:
        made.server = server and server.opened()
    except VoltforgeError as error:
        console.warn(f"{error.what}: objects are those of this disk")
        return Objects(made.program, folder)
    return made if made.reachable() else Objects(made.program, folder)


def names(folders: Iterable[Path]) -> str:
    """The digest of the names of all headers in some folders, and of what decides which others are made.

    Of CMake's files the content counts: they generate headers.
    """
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
    """What a log of ccache's says of one build: for each source a line ``# path``, then what was done.

    What CMake compiles to see whether it can is passed over: some of it is in a folder of another name each time.
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
