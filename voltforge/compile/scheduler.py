"""Start each compiler of a build when a core and enough memory are free, longest object first.

CMake puts ``launcher.py`` before each compiler and linker. The launcher connects to a socket, sends a request, and
starts its command when the scheduler grants the request. The connection closes when the command ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from voltforge.compile.costs import PROBES, Estimate, Estimates
from voltforge.compile.farm import Farm, ObjectKey
from voltforge.compile.jobs import Memory, memory
from voltforge.compile.process_memory import sample_memory
from voltforge.errors import VoltforgeError
from voltforge.system import console, files

SAMPLE_INTERVAL = 0.25
"""Seconds between two samples of the memory of all jobs."""
SAVE_INTERVAL = 20.0
"""Seconds between two writes of the history files."""
QUEUE_LENGTH = 48
"""Jobs in the queue besides those that run. A longer queue finds longer objects to start first."""
MAX_QUEUE_LENGTH = 1000
"""The same with other hosts, which choose among the jobs in this queue."""
QUEUED_JOB_BYTES = 4_200_000
"""Memory of a launcher that waits (measured: Python 3.11)."""
START_TIMEOUT = 10.0
"""Seconds in which a scheduler must answer on its socket."""
MAX_REQUEST = 1 << 16
"""Bytes of a request."""
SOCKET = "socket"
"""File name of the socket; launcher.py has it too."""
LAUNCHER = Path(__file__).with_name("launcher.py")
MAIN_PID = os.getpid()
"""The first process of this run: doit forks its workers after this module is imported."""
UNKNOWN = Estimate(0.0, 0)
"""The estimate of a job whose request has not arrived."""


@dataclass(eq=False)
class Job:
    """A command of a build: queued until it is granted a slot, then running."""

    connection: socket.socket
    pid: int
    package: str = ""
    build: str = ""
    """The build in :mod:`voltforge.compile.farm`; empty if other hosts cannot share the object."""
    name: str = ""
    """The path of its output, as the compiler gets it with ``-o``."""
    estimate: Estimate = UNKNOWN
    started: float | None = None
    """Monotonic time of the grant; ``None`` in the queue."""
    memory: int = 0
    """Bytes that the job and its children hold, at the last sample."""
    peak_memory: int = 0
    remote_host: str = ""
    """The other host that compiles this object now."""

    @property
    def object_key(self) -> ObjectKey:
        """The object's key in a farm."""
        return self.build, self.name

    @property
    def growth(self) -> int:
        """Bytes that the job is still expected to allocate."""
        return max(0, self.estimate.memory - self.memory)


@dataclass(frozen=True)
class Status:
    """The number of jobs in each state, and their memory."""

    running: int = 0
    waiting: int = 0
    """Queued jobs, without ``remote``."""
    remote: int = 0
    """Queued jobs whose objects other hosts compile."""
    memory: int = 0
    """Bytes that all running jobs hold."""


@dataclass
class Scheduler:
    """The scheduler of all builds of a checkout, shared by all processes of a run.

    A request is granted if fewer than ``jobs`` commands run and if its memory estimate fits into the available memory,
    less the growth that the running jobs are expected to have. The longest job that fits goes first. If nothing runs,
    one job starts however little memory is free.
    """

    folder: Path
    """The folder of the socket and the launcher. The sandbox of a build shows it."""
    jobs: int
    """The slots: commands that run at once."""
    estimates: Mapping[str, Estimates]
    """By package."""
    memory: Callable[[], Memory | None] = memory
    limit: int | None = None
    """Bytes that all processes of this run together may hold."""
    status: Status = Status()
    farm: Farm | None = None
    """Other hosts. A job waits while another host compiles its object."""
    _queue: list[Job] = field(default_factory=list)
    _running: list[Job] = field(default_factory=list)
    _run_memory: int = 0
    """Bytes that all processes of this run hold, at the last sample."""
    _warned: bool = False
    _thread: threading.Thread | None = None
    _error: OSError | None = None
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _starting: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ninja_jobs(self) -> int:
        """The ``-j`` for ninja: the slots and the queue. With other hosts the queue fills up to 1/8 of the memory."""
        available = self.available_memory if self.farm else None
        if available is None:
            return self.jobs + QUEUE_LENGTH
        affordable = available.room // 8 // QUEUED_JOB_BYTES
        return self.jobs + min(MAX_QUEUE_LENGTH, max(QUEUE_LENGTH, affordable))

    @property
    def available_memory(self) -> Memory | None:
        """The memory for this run; ``None`` if it is unknown."""
        available = self.memory()
        if self.limit is None:
            return available
        return (available or Memory(self.limit, self.limit)).within(self.limit, self._run_memory)

    def remaining_seconds(self, package: str, unqueued: int = 0) -> float | None:
        """Estimate the seconds until a package's build ends; ``None`` if the package was never built here.

        Args:
            package: the package's name.
            unqueued: commands that ninja has not started yet.
        """
        estimates = self.estimates[package]
        if not estimates.mean_seconds:
            return None
        now = time.monotonic()
        jobs = [*self._running, *self._local_queue()]
        remaining = [max(0.0, job.estimate.seconds - (now - (job.started or now))) for job in jobs]
        return max([(sum(remaining) + unqueued * estimates.mean_seconds) / self.jobs, *remaining])

    def start(self, farm: Farm | None = None) -> None:
        """Serve requests in a thread until this process ends, unless another process of this run does so.

        Raises:
            VoltforgeError: no scheduler answers on the socket.
        """
        with self._starting:
            self.farm = self.farm or farm
            if self._thread is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                files.write(self.folder / LAUNCHER.name, LAUNCHER.read_bytes())
                self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
                self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if self._error or time.monotonic() > deadline:
                reason = self._error or f"no answer in {START_TIMEOUT:.0f} seconds"
                raise VoltforgeError(
                    f"the scheduler cannot listen on {self.folder / SOCKET}: {reason}",
                    hint="move the checkout to a file system that supports Unix sockets",
                )
            time.sleep(0.02)

    def variables(self, package: str, folder: Path, python: Path) -> dict[str, str]:
        """Return the environment variables that put the launcher before every compiler and linker of CMake.

        The launcher finds the scheduler's folder in ``VOLTFORGE_GATE``.
        ``CMAKE_ARGS`` is for vLLM: its setup.py reads them last, after the ccache that it finds by itself. Other
        projects read only the variables of CMake.

        Args:
            package: the package's name.
            folder: the scheduler's folder as the build sees it.
            python: the interpreter for the launcher, as the build sees it.
        """
        launcher = f"{python};-I;-S;{folder / LAUNCHER.name}"
        languages, programs = ("C", "CXX", "CUDA"), ("COMPILER", "LINKER")
        launchers = {f"CMAKE_{lang}_{program}_LAUNCHER": launcher for lang in languages for program in programs}
        cmake_args = " ".join(f"-D{name}={value}" for name, value in launchers.items())
        return {"VOLTFORGE_GATE": str(folder), "VOLTFORGE_PACKAGE": package, "CMAKE_ARGS": cmake_args, **launchers}

    def save(self) -> None:
        """Write the measurements of all packages to their history files."""
        for estimates in self.estimates.values():
            estimates.save()

    def _answers(self) -> bool:
        with socket_address(self.folder, SOCKET) as address, socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(address)
            except OSError:
                return False
            return True

    def _run(self) -> None:
        """Wait for the lock, then serve. All connections close at the end, so that no launcher waits for ever."""
        try:
            with (self.folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with socket_address(self.folder, SOCKET) as address, socket.socket(socket.AF_UNIX) as listener:
                    files.remove(self.folder / SOCKET)
                    listener.bind(address)
                    listener.listen(1024)
                    self._serve(listener)
        except OSError as error:
            self._error = error
        finally:
            for job in [*self._queue, *self._running]:
                job.connection.close()

    def _serve(self, listener: socket.socket) -> None:
        next_sample, next_save = time.monotonic(), time.monotonic() + SAVE_INTERVAL
        with self._selector as selector:
            selector.register(listener, selectors.EVENT_READ)
            while True:
                idle = not (self._running or self._queue)
                for key, _ in selector.select(None if idle else max(0.0, next_sample - time.monotonic())):
                    if key.fileobj is listener:
                        connection, _ = listener.accept()
                        selector.register(connection, selectors.EVENT_READ, Job(connection, _peer_pid(connection)))
                    else:
                        self._receive(key.data)
                if time.monotonic() >= next_sample:
                    self._sample_memory()
                    self._update_farm()
                    next_sample = time.monotonic() + SAMPLE_INTERVAL
                if time.monotonic() >= next_save:
                    self.save()
                    next_save = time.monotonic() + SAVE_INTERVAL
                self._grant()
                remote = sum(bool(job.remote_host) for job in self._queue)
                used = sum(job.memory for job in self._running)
                self.status = Status(len(self._running), len(self._queue) - remote, remote, used)

    def _receive(self, job: Job) -> None:
        """Queue a job when its request arrives, and end it when its connection closes. Bad requests are dropped."""
        try:
            data = job.connection.recv(MAX_REQUEST)
        except OSError:
            data = b""
        if data and job.name:
            return
        if data:
            parts = data.decode(errors="replace").rstrip("\n").split("\t", 2)
            job.package, job.build, job.name = parts if len(parts) == 3 else ("", "", "")
            if any(probe in job.name for probe in PROBES):
                job.build = ""
            if job.package in self.estimates and job.name:
                job.estimate = self.estimates[job.package].of(job.name)
                self._queue.append(job)
                return
        self._end(job)

    def _end(self, job: Job) -> None:
        """Remove a job, and record its measurements if it ran."""
        self._selector.unregister(job.connection)
        job.connection.close()
        if job in self._queue:
            self._queue.remove(job)
        if job in self._running:
            self._running.remove(job)
            if job.started is not None:
                seconds = time.monotonic() - job.started
                self.estimates[job.package].record(job.name, Estimate(seconds, job.peak_memory))
                if self.farm and job.build:
                    self.farm.mark_done(job.object_key, seconds)

    def _update_farm(self) -> None:
        """Find the jobs whose objects other hosts compile, and renew this host's claims."""
        if self.farm:
            shared = [job for job in self._queue if job.build]
            for job, host in zip(shared, self.farm.holders([job.object_key for job in shared]), strict=True):
                job.remote_host = host
            self.farm.renew_claims(job.object_key for job in self._running if job.build)

    def _grant(self) -> None:
        """Grant a slot to every job that fits."""
        while job := next_job(self._local_queue(), self._running, self.jobs, room := self._room()):
            if self.farm and job.build and (host := self.farm.claim(job.object_key)):
                job.remote_host = host
                continue
            if room is not None and job.estimate.memory > room:
                self._warn_little_memory(job, room)
            self._queue.remove(job)
            try:
                job.connection.send(b"g")
            except OSError:
                continue  # the launcher is gone; the selector reports the closed connection next
            job.started = time.monotonic()
            self._running.append(job)

    def _local_queue(self) -> list[Job]:
        """Return the queued jobs that no other host does."""
        return [job for job in self._queue if not job.remote_host]

    def _room(self) -> int | None:
        """Return the bytes for another job: what is available, less the growth of the running jobs."""
        available = self.available_memory
        return available.room - sum(job.growth for job in self._running) if available else None

    def _warn_little_memory(self, job: Job, room: int) -> None:
        if self._warned:
            return
        self._warned = True
        estimate, free = files.size(job.estimate.memory), files.size(max(room, 0))
        with contextlib.suppress(OSError, ValueError):  # a closed terminal must not stop the build
            console.note(f"{Path(job.name).name} runs alone: it is expected to take {estimate}, and {free} are free")

    def _sample_memory(self) -> None:
        """Measure the memory of each job and of this run, and end the jobs whose commands have ended."""
        if not self._running and self.limit is None:
            return
        sample = sample_memory([job.pid for job in self._running if job.pid], MAIN_PID)
        self._run_memory = sample.run
        for job in [*self._running]:
            job.memory = sample.trees.get(job.pid, 0)
            job.peak_memory = max(job.peak_memory, job.memory, sample.peaks.get(job.pid, 0))
            # A background process of a command inherits the connection; the slot is free once the command has ended.
            if job.pid and job.pid not in sample.pids:
                self._end(job)


def next_job(queue: Sequence[Job], running: Sequence[Job], jobs: int, room: int | None) -> Job | None:
    """Return the next job to start: the longest whose memory estimate fits; ``None`` if none can start.

    If nothing runs and nothing fits, it is the job with the smallest memory estimate.

    Args:
        queue: the jobs to choose from.
        running: the jobs that hold a slot.
        jobs: the number of slots.
        room: free bytes; ``None`` if unknown.
    """
    if not queue or len(running) >= jobs:
        return None
    fitting = [job for job in queue if room is None or job.estimate.memory <= room]
    if fitting:
        return max(fitting, key=lambda job: job.estimate.seconds)
    return None if running else min(queue, key=lambda job: job.estimate.memory)


@contextlib.contextmanager
def socket_address(folder: Path, name: str) -> Iterator[str]:
    """Yield a short address for a socket in a folder, by a descriptor of the folder.

    The address of a socket holds 108 bytes (unix(7)), and the path of the folder may be longer.
    """
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def _peer_pid(connection: socket.socket) -> int:
    """Return the process at the other end, as its number in this PID namespace."""
    pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(pid)
