"""Objects that were compiled before: ccache in front of the compilers, on this disk, and on a server for many machines.

ccache, not sccache: it knows nvcc's objects by their sources and headers without running the preprocessor, takes the
options that make them reproducible, and stores what the compiler made as it made it (docs/speed.md has the figures).
"""

from __future__ import annotations

import re
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from voltforge import console, files, relay
from voltforge.errors import VoltforgeError
from voltforge.gate import LAUNCHER, at
from voltforge.index import redacted
from voltforge.needs import Needs
from voltforge.sandbox import SYSTEM

OFF = "off"
SCHEMES = {"redis": 6379, "http": 80}
"""What ccache 4.7 speaks without a network library of its own, and the port where none is named; WebDAV is http."""
RELAY = Path(relay.__file__)
SOCKET = "objects"
"""The socket in the gate's folder that leads to the server."""
PORT = 4226
"""Where a sandbox without a network has the server."""
PATIENCE = 5.0
"""Seconds in which a server has to answer."""
STRIKES = 3
"""So many times in a row that a server does not answer, and it is not asked any more."""
LIMIT = "10G"
"""The most that the local cache holds; ccache throws out what was used least recently."""
LOG = "ccache.stats"
"""What ccache did with each source, in the build's home."""
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
    """As it was named: ``redis://host``, ``http://host/folder``."""
    host: str
    port: int

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
                hint="ccache=redis://host:6379, ccache=http://host/folder (WebDAV), or ccache=off",
            )
        return cls(address, parts.hostname, port or SCHEMES[parts.scheme])

    def seen(self, host: str, port: int) -> str:
        """The address of the same server where a build sees it at another place."""
        parts = urlsplit(self.address)
        user = parts.netloc.rpartition("@")[0]
        return parts._replace(netloc=f"{user + '@' if user else ''}{host}:{port}").geturl()

    def __str__(self) -> str:
        return redacted(self.address)


@dataclass
class Objects:
    """The cache of a checkout."""

    program: Path
    """ccache."""
    folder: Path
    """What is on this disk."""
    server: Server | None = None
    _strikes: int = 0
    _doors: set[Path] = field(default_factory=set)

    def variables(self, compilers: str, cache: Path, home: Path, server: str) -> dict[str, str]:
        """What ccache is told, given where a build sees its folders.

        ``compilers`` stands for the toolchain: ccache itself would look at nvcc alone, and not at what nvcc calls.
        """
        return {
            "CCACHE_CONFIGPATH": "/dev/null",
            "CCACHE_DIR": str(cache),
            "CCACHE_MAXSIZE": LIMIT,
            "CCACHE_COMPILERCHECK": f"string:{compilers}",
            "CCACHE_DEPEND": "1",  # headers are those that the compiler names: no preprocessor for what is not there
            "CCACHE_STATSLOG": str(home / LOG),
            **({"CCACHE_REMOTE_STORAGE": f"{server}|operation-timeout={int(PATIENCE * 1000)}"} if server else {}),
        }

    def lead(self, folder: Path) -> None:
        """Let what comes to the socket in ``folder`` reach the server, from now to the end of the process."""
        if folder in self._doors:
            return
        self._doors.add(folder)
        files.write(folder / RELAY.name, RELAY.read_bytes())
        files.remove(folder / SOCKET)
        door = socket.socket(socket.AF_UNIX)
        with at(folder, SOCKET) as address:
            door.bind(address)
        door.listen(128)
        threading.Thread(target=self._serve, args=(door,), name="objects", daemon=True).start()

    def reachable(self) -> bool:
        """Whether the server takes a connection; it is told where it does not."""
        if not self.server:
            return False
        try:
            self._connected().close()
        except OSError as error:
            console.warn(f"{self.server} cannot be reached ({error.strerror or error}): objects are those of this disk")
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
        except OSError:
            one.close()
            fine = False
        else:
            other.settimeout(None)  # between two questions ccache compiles
            fine = relay.join(one, other)
        self._strikes = 0 if fine else self._strikes + 1
        if self._strikes == STRIKES:
            console.warn(f"{self.server} did not answer {STRIKES} times in a row: it is not asked any more in this run")


def chosen(setting: str, folder: Path) -> Objects | None:
    """The cache that ``ccache=`` asks for: on this disk where it is empty; none if it is off or there is no ccache.

    Raises:
        VoltforgeError: it is no address of a server.
    """
    if setting == OFF:
        return None
    server = Server.parse(setting) if setting else None
    program = shutil.which("ccache")
    if not program or not any(Path(program).is_relative_to(place) for place in SYSTEM):
        if server:
            console.warn(f"{server} is not asked, for there is no ccache here: ./doit doctor says what gets it")
        return None
    made = Objects(Path(program), folder, server)
    return made if not server or made.reachable() else Objects(Path(program), folder)


def found(log: Path, needs: Needs | None) -> Found:
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


def without(words: Sequence[str]) -> list[str]:
    """A command without what stands before the compiler: the launcher, and ccache."""
    start = next((place + 1 for place, word in enumerate(words) if Path(word).name == LAUNCHER.name), 0)
    return [*words[start + (len(words) > start and Path(words[start]).name == "ccache") :]]
