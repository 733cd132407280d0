"""Leave to compile: every compiler of a build asks here, and is let through when cores and memory allow."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from voltforge.compile.costs import PROBES, Need, Needs
from voltforge.compile.farm import Farm, Object
from voltforge.compile.jobs import Memory, memory
from voltforge.errors import VoltforgeError
from voltforge.system import console, files

TICK = 0.25
"""Seconds between two looks at what the jobs hold."""
KEEP = 20.0
"""Seconds between two times that what was learnt is written down."""
WINDOW = 48
"""Commands that may stand and wait beside those that run: of so many the longest is let through first."""
WIDEST = 1000
"""The most that may where other hosts take of them too: what stands here is all that they can choose from."""
WAITER = 4_200_000
"""Bytes that one which waits holds (measured: Python 3.11)."""
PATIENCE = 10.0
"""Seconds in which a gate opens."""
NAME = 1 << 16
"""Bytes that a job may say of itself."""
SOCKET = "socket"
"""The name of the socket, which the launcher knows too."""
LAUNCHER = Path(__file__).with_name("launcher.py")
"""What stands before each compiler and asks for it."""
PAGE = resource.getpagesize()
US = os.getpid()
"""The first process of this run: doit's workers come later."""


NOTHING = Need(0.0, 0)
"""What a job of an unknown package is expected to take."""


@dataclass(eq=False)
class Job:
    """One command that asked."""

    connection: socket.socket
    pid: int
    package: str = ""
    build: str = ""
    """What a farm knows its build by; empty where it is none of other hosts' business."""
    name: str = ""
    need: Need = NOTHING
    began: float | None = None
    """When it was let through; ``None`` while it waits."""
    now: int = 0
    """Bytes that it and its children held when they were looked at last."""
    peak: int = 0
    elsewhere: str = ""
    """The host of a farm that does it."""

    @property
    def known(self) -> Object:
        """What a farm knows it by."""
        return self.build, self.name

    @property
    def growth(self) -> int:
        """Bytes that it may still come to hold beyond those it has."""
        return max(0, self.need.memory - self.now)


@dataclass(frozen=True)
class Status:
    """What a gate sees at a moment."""

    running: int = 0
    waiting: int = 0
    """Those that other hosts do are not among them."""
    elsewhere: int = 0
    memory: int = 0
    """Bytes that all jobs hold."""


@dataclass
class Gate:
    """One for all that a checkout builds at the same time, in whichever process of a run; it opens when it is needed.

    A job is let through if fewer than ``jobs`` are, and if what memory there is, less what the others may still grow
    by, is enough for what it took the last time. The longest of those that wait goes first. Where none is running one
    always goes, however little memory there is.
    """

    folder: Path
    """Where jobs find it: a folder that their sandbox shows them, with the launcher beside the socket."""
    jobs: int
    needs: Mapping[str, Needs]
    """By package."""
    memory: Callable[[], Memory | None] = memory
    limit: int | None = None
    """Bytes that all processes of this run together may hold."""
    status: Status = Status()
    farm: Farm | None = None
    """The other hosts, if there are any: of what they compile nothing is let through here until it is done there."""
    _waiting: list[Job] = field(default_factory=list)
    _running: list[Job] = field(default_factory=list)
    _used: int = 0
    _told: set[str] = field(default_factory=set)
    _thread: threading.Thread | None = None
    _error: OSError | None = None
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _opening: threading.Lock = field(default_factory=threading.Lock)

    @property
    def window(self) -> int:
        """How many commands a build may start at once, most of which will stand here and wait.

        With other hosts as many more as an eighth of the memory there is can hold.
        """
        there = self.allowed if self.farm else None
        return self.jobs + (min(WIDEST, max(WINDOW, there.room // 8 // WAITER)) if there else WINDOW)

    @property
    def allowed(self) -> Memory | None:
        """What there is of memory for this run, if anything tells."""
        there = self.memory()
        if self.limit is None:
            return there
        return (there or Memory(self.limit, self.limit)).within(self.limit, self._used)

    def left(self, package: str, beyond: int = 0) -> float | None:
        """Seconds that a package's build will take from now on, with ``beyond`` more commands than have asked.

        As long as the last time; ``None`` where there was none.
        """
        needs = self.needs[package]
        if not needs.mean:
            return None
        now = time.monotonic()
        here = [*self._running, *self._here()]
        rest = [max(0.0, job.need.seconds - (now - (job.began or now))) for job in here]
        return max([(sum(rest) + beyond * needs.mean) / self.jobs, *rest])

    def open(self, farm: Farm | None = None) -> None:
        """Begin to answer, unless another process of this run does; it goes on to the end of the process.

        Raises:
            VoltforgeError: nobody answers at this folder.
        """
        with self._opening:
            self.farm = self.farm or farm
            if self._thread is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                files.write(self.folder / LAUNCHER.name, LAUNCHER.read_bytes())
                self._thread = threading.Thread(target=self._lead, name="gate", daemon=True)
                self._thread.start()
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            if self._error or time.monotonic() > deadline:
                why = f" ({self._error})" if self._error else ""
                raise VoltforgeError(
                    f"nobody opens the gate at {self.folder}{why}", hint="can that folder hold a socket?"
                )
            time.sleep(0.02)

    def variables(self, package: str, folder: Path, python: Path) -> dict[str, str]:
        """What makes CMake ask at the gate for every compiler and linker, given where a build sees all this.

        Of CMAKE_ARGS, setup.py of vLLM takes it last of all, and so instead of a ccache that it finds by itself; the
        others reach projects that do not read that.
        """
        asks = f"{python};-I;-S;{folder / LAUNCHER.name}"
        kinds = "COMPILER", "LINKER"
        launchers = {f"CMAKE_{lang}_{kind}_LAUNCHER": asks for lang in ("C", "CXX", "CUDA") for kind in kinds}
        named = " ".join(f"-D{name}={value}" for name, value in launchers.items())
        return {"VOLTFORGE_GATE": str(folder), "VOLTFORGE_PACKAGE": package, "CMAKE_ARGS": named, **launchers}

    def keep(self) -> None:
        """Write down what was learnt of all packages."""
        for needs in self.needs.values():
            needs.keep()

    def _answers(self) -> bool:
        with at(self.folder, SOCKET) as address, socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(address)
            except OSError:
                return False
            return True

    def _lead(self) -> None:
        """Answer here, as soon as no other process of this run does. However that ends, nobody is left to wait."""
        try:
            with (self.folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with at(self.folder, SOCKET) as address, socket.socket(socket.AF_UNIX) as door:
                    files.remove(self.folder / SOCKET)
                    door.bind(address)
                    door.listen(1024)
                    self._serve(door)
        except OSError as error:
            self._error = error
        finally:
            for job in [*self._waiting, *self._running]:
                job.connection.close()

    def _serve(self, door: socket.socket) -> None:
        look, keep = time.monotonic(), time.monotonic() + KEEP
        with self._selector as selector:
            selector.register(door, selectors.EVENT_READ)
            while True:
                idle = not (self._running or self._waiting)
                for key, _ in selector.select(None if idle else max(0.0, look - time.monotonic())):
                    if key.fileobj is door:
                        connection, _ = door.accept()
                        selector.register(connection, selectors.EVENT_READ, Job(connection, _peer(connection)))
                    else:
                        self._hear(key.data)
                if time.monotonic() >= look:
                    self._look()
                    self._ask_around()
                    look = time.monotonic() + TICK
                if time.monotonic() >= keep:
                    self.keep()
                    keep = time.monotonic() + KEEP
                self._admit()
                held = sum(job.now for job in self._running)
                elsewhere = sum(bool(job.elsewhere) for job in self._waiting)
                self.status = Status(len(self._running), len(self._waiting) - elsewhere, elsewhere, held)

    def _hear(self, job: Job) -> None:
        """Take in what a job says: its name; or that it has ended, by saying no more. Who talks nonsense is let go."""
        try:
            said = job.connection.recv(NAME)
        except OSError:
            said = b""
        if said and job.name:
            return
        if said:
            words = said.decode(errors="replace").rstrip("\n").split("\t", 2)
            job.package, job.build, job.name = words if len(words) == 3 else ("", "", "")
            if any(probe in job.name for probe in PROBES):
                job.build = ""
            if job.package in self.needs and job.name:
                job.need = self.needs[job.package].of(job.name)
                self._waiting.append(job)
                return
        self._end(job)

    def _end(self, job: Job) -> None:
        """Take a job out, and learn from it."""
        self._selector.unregister(job.connection)
        job.connection.close()
        if job in self._waiting:
            self._waiting.remove(job)
        if job in self._running:
            self._running.remove(job)
            if job.began is not None:
                seconds = time.monotonic() - job.began
                self.needs[job.package].learn(job.name, Need(seconds, job.peak))
                if self.farm and job.build:
                    self.farm.done(job.known, seconds)

    def _ask_around(self) -> None:
        """Learn what other hosts do, and let them know what is done here."""
        if self.farm:
            shared = [job for job in self._waiting if job.build]
            for job, host in zip(shared, self.farm.holders([job.known for job in shared]), strict=True):
                job.elsewhere = host
            self.farm.renew(job.known for job in self._running if job.build)

    def _admit(self) -> None:
        while job := following(self._here(), self._running, self.jobs, room := self._room()):
            if self.farm and job.build and (host := self.farm.claim(job.known)):
                job.elsewhere = host
                continue
            if room is not None and job.need.memory > room:
                self._tell_of(job, room)
            self._waiting.remove(job)
            try:
                job.connection.send(b"g")
            except OSError:
                continue  # it is gone; its end is heard next
            job.began = time.monotonic()
            self._running.append(job)

    def _here(self) -> list[Job]:
        """Those that wait and that nobody else does."""
        return [job for job in self._waiting if not job.elsewhere]

    def _room(self) -> int | None:
        """Bytes for another job: what there is, less what the running ones may still grow by."""
        there = self.allowed
        return there.room - sum(job.growth for job in self._running) if there else None

    def _tell_of(self, job: Job, room: int) -> None:
        if "alone" not in self._told:
            self._told.add("alone")
            wants, has = files.size(job.need.memory), files.size(max(room, 0))
            with contextlib.suppress(OSError, ValueError):  # a terminal that is gone stops no build
                console.note(
                    f"{Path(job.name).name} is expected to take {wants}, where {has} can be had: it runs alone"
                )

    def _look(self) -> None:
        """See what each job holds, with all its children, and this process with all that it started."""
        if not self._running and self.limit is None:
            return
        parents, held = _processes()
        owners = {job.pid: job for job in self._running}
        for job in self._running:
            job.now = 0
        self._used = 0
        for pid, bytes_held in held.items():
            above, seen = pid, set()
            owner: Job | None = None
            while above and above not in seen:
                seen.add(above)
                owner = owner or owners.get(above)
                if above == US:
                    self._used += bytes_held
                    break
                above = parents.get(above, 0)
            if owner:
                owner.now += bytes_held
                owner.peak = max(owner.peak, _most(pid))
        for job in [*self._running]:
            job.peak = max(job.peak, job.now)
            if job.pid and job.pid not in held:  # what it left running keeps its end of the connection, and no place
                self._end(job)


def following(waiting: Sequence[Job], running: Sequence[Job], jobs: int, room: int | None) -> Job | None:
    """Which job is let through next, if any: of those whose memory fits into ``room`` bytes the longest.

    If none runs and none fits, the one that needs the least. ``None`` for ``room`` means that it is not known.
    """
    if not waiting or len(running) >= jobs:
        return None
    fitting = [job for job in waiting if room is None or job.need.memory <= room]
    if fitting:
        return max(fitting, key=lambda job: job.need.seconds)
    return None if running else min(waiting, key=lambda job: job.need.memory)


@contextlib.contextmanager
def at(folder: Path, name: str) -> Iterator[str]:
    """The address of a socket in a folder, by way of the folder's descriptor: an address holds 108 bytes (unix(7))."""
    place = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{place}/{name}"
    finally:
        os.close(place)


def _peer(connection: socket.socket) -> int:
    """The process at the other end, as it is numbered here."""
    pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(pid)


def _processes() -> tuple[dict[int, int], dict[int, int]]:
    """The parent of each process and the bytes that it holds (proc_pid_stat(5)); four times a second, psutil's objects
    for each of them took a twentieth of a core.
    """
    parents, held = {}, {}
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{entry}/stat", "rb") as stat:
            words = stat.read().rpartition(b")")[2].split()  # a name may hold anything, brackets too
            parents[int(entry)], held[int(entry)] = int(words[1]), int(words[21]) * PAGE
    return parents, held


def _most(pid: int) -> int:
    """The most bytes that a process ever held (proc_pid_status(5)); 0 once it is gone."""
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0
