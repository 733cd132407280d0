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
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from voltforge.compile import s3, tunnel
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
TUNNEL = Path(tunnel.__file__)
SOCKET = f"objects-{os.getpid()}"
"""The socket in the scheduler's folder that leads to the server; one for each process of a run."""
PORT = 4226
"""The address of the server inside a sandbox without network."""
TIMEOUT = 5.0
"""Seconds for a server to answer."""
MAX_FAILURES = 3
"""After so many failures in a row a server is not used again in this run."""
HEADERS = (".h", ".hpp", ".hh", ".hxx", ".cuh", ".inc", ".inl", ".ipp", ".def", ".tcc")
"""The file name endings of headers; those of C++'s own headers have no dot."""
GENERATORS = ("CMakeLists.txt", ".cmake", ".in")
SYSTEM_HEADERS = (Path("/usr/include"), Path("/usr/local/include"))
LIMIT = "10G"
"""The size limit of the cache on this disk; ccache removes the least recently used objects."""
MIN_VERSION = (4, 7)
"""The first version of ccache that reads CCACHE_REMOTE_STORAGE."""


@dataclass(frozen=True)
class ObjectServer:
    """A server with the objects of several machines."""

    address: str
    """The address, as given or normalized: ``redis://host``, ``http://host/folder``."""
    host: str
    port: int
    bucket: str = ""
    """The bucket behind a server that this process runs: ``s3://bucket/folder``."""

    @classmethod
    def parse(cls, address: str) -> ObjectServer:
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
        user, _, host = parts.netloc.rpartition("@")
        if parts.scheme == "redis" and user and not (":" in user and user.split(":")[0]):
            # redis writes a bare password with a colon before it, ccache without; redis 6 has a user name for it.
            address = parts._replace(netloc=f"default:{user.removeprefix(':')}@{host}").geturl()
        return cls(address, parts.hostname, port or SCHEMES[parts.scheme])

    def connectable(self) -> ObjectServer:
        """Return the server in a form that ccache can reach: for a bucket, a WebDAV server of this process.

        Raises:
            VoltforgeError: the bucket cannot be reached.
        """
        if urlsplit(self.address).scheme != s3.SCHEME:
            return self
        return replace(ObjectServer.parse(s3.serve(self.address)), bucket=self.address)

    def remote_storage(self, host: str, port: int) -> str:
        """Return the value of CCACHE_REMOTE_STORAGE for a build that reaches the server at ``host`` and ``port``."""
        parts = urlsplit(self.address)
        user = parts.netloc.rpartition("@")[0]
        layout = "|layout=flat" if self.bucket else ""  # a bucket needs no folders
        return parts._replace(netloc=f"{user + '@' if user else ''}{host}:{port}").geturl() + layout

    def farm(self) -> Farm | None:
        """The farm of hosts at this server; ``None`` for WebDAV, which cannot coordinate them."""
        return Farm(self.address) if self.address.startswith("redis:") else None

    def __str__(self) -> str:
        return redacted(self.bucket or self.address)


@dataclass
class ObjectCache:
    """The object cache of a checkout."""

    program: Path
    """The path of ccache."""
    folder: Path
    """The cache on this disk."""
    server: ObjectServer | None = None
    _failures: int = 0
    _failures_lock: threading.Lock = field(default_factory=threading.Lock)
    _forwarded: set[Path] = field(default_factory=set)

    def log(self, package: str, cache: Path | None = None) -> Path:
        """The log of ccache for a package, in the folder of the cache as the build sees it."""
        return (cache or self.folder) / f"{package}.stats"

    def variables(self, package: str, inputs: str, cache: Path, server: str) -> dict[str, str]:
        """Return the variables for the launcher and ccache, given the place where a build sees the cache.

        ``inputs`` is the digest of everything that an object depends on besides its command and the headers that
        were read: the toolchain, of which ccache checks nvcc only, and the names of all headers. A new header that
        hides another one, or that ``__has_include`` finds, would go unnoticed otherwise.
        """
        return {
            "VOLTFORGE_CCACHE": str(self.program),
            "CCACHE_CONFIGPATH": "/dev/null",
            "CCACHE_DIR": str(cache),
            "CCACHE_MAXSIZE": LIMIT,
            "CCACHE_COMPILERCHECK": f"string:{inputs}",
            "CCACHE_DEPEND": "1",  # depend mode: the compiler lists the headers, no preprocessor runs
            "CCACHE_SLOPPINESS": "include_file_ctime",  # a new hard link changes the ctime of a header
            "CCACHE_STATSLOG": str(self.log(package, cache)),
            **(
                {
                    "CCACHE_REMOTE_STORAGE": f"{server}|operation-timeout={int(TIMEOUT * 1000)}",
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

    def forward(self, folder: Path) -> None:
        """Forward connections of the socket in ``folder`` to the server until this process ends."""
        if folder in self._forwarded:
            return
        self._forwarded.add(folder)
        files.write(folder / TUNNEL.name, TUNNEL.read_bytes())
        files.remove(folder / SOCKET)
        listener = socket.socket(socket.AF_UNIX)
        with socket_address(folder, SOCKET) as address:
            listener.bind(address)
        listener.listen(128)
        threading.Thread(target=self._serve, args=(listener,), name="object cache", daemon=True).start()

    def reachable(self) -> bool:
        """Return True if the server accepts connections; report it otherwise."""
        if not self.server:
            return False
        try:
            self._connect().close()
        except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
            reason = getattr(error, "strerror", None) or error
            console.warn(f"{self.server} cannot be reached ({reason}): only the cache on this disk is used")
            return False
        return True

    def _connect(self) -> socket.socket:
        assert self.server
        return socket.create_connection((self.server.host, self.server.port), timeout=TIMEOUT)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=self._connect_client, args=(client,), daemon=True).start()

    def _connect_client(self, client: socket.socket) -> None:
        """Connect a client to the server, unless the server failed too often: each failure delays a compiler."""
        if self._failures >= MAX_FAILURES:
            client.close()
            return
        try:
            server = self._connect()
        except (OSError, UnicodeError):
            client.close()
            answered = False
        else:
            server.settimeout(None)  # ccache compiles between two requests
            answered = tunnel.join(client, server)
        with self._failures_lock:
            self._failures = 0 if answered else self._failures + 1
            gave_up = self._failures == MAX_FAILURES
        if gave_up:
            console.warn(
                f"{self.server} did not answer {MAX_FAILURES} times in a row and is not used again in this run"
            )


def server_of(setting: str) -> ObjectServer | None:
    """Return the server that ``ccache=`` names, if any.

    Raises:
        VoltforgeError: it is not the address of a server.
    """
    return ObjectServer.parse(setting) if setting not in ("", OFF) else None


def open_cache(setting: str, folder: Path) -> ObjectCache | None:
    """Return the cache for ``ccache=``: on this disk if it is empty; ``None`` if it is off or ccache is not installed.

    Raises:
        VoltforgeError: it is not the address of a server.
    """
    if setting == OFF:
        return None
    server = server_of(setting)
    program = shutil.which("ccache")
    if not program or not any(Path(program).is_relative_to(folder) for folder in SYSTEM):  # a sandbox shows no others
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
    local = ObjectCache(Path(program), folder)
    if not server:
        return local
    if (version := _version(local.program)) < MIN_VERSION:
        console.warn(f"{server} is not used: ccache {'.'.join(map(str, version))} is older than 4.7")
        return local
    try:
        shared = replace(local, server=server.connectable())
    except VoltforgeError as error:
        console.warn(f"{error.what}: only the cache on this disk is used")
        return local
    return shared if shared.reachable() else local


def header_names_digest(folders: Iterable[Path]) -> str:
    """Return the digest of the names of all headers in some folders, and of the content of CMake's files."""
    lines: list[str] = []
    for number, folder in enumerate(folders):
        for parent, _, names in os.walk(folder):
            prefix = f"{number}:{os.path.relpath(parent, folder)}"
            lines += [f"{prefix}/{name}" for name in names if name.endswith(HEADERS) or "." not in name]
            lines += [f"{prefix}/{files.sha256(Path(parent, name))}" for name in names if name.endswith(GENERATORS)]
    return files.digest(sorted(lines))


def _version(program: Path) -> tuple[int, ...]:
    version = re.search(r"([0-9]+)\.([0-9]+)", run([program, "--version"], ok=range(256)).output)
    return tuple(int(part) for part in version.groups()) if version else (0,)
