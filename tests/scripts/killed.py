"""Run doit in this process and kill it, or fill its disk, at one exact moment. Usage: killed.py POINT WORDS…

POINT is a :class:`Point` as JSON. Python calls an audit hook before it opens, renames or removes a file and before it
starts a program (PEP 578), so the moment is exact.
"""

from __future__ import annotations

import atexit
import contextlib
import fnmatch
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.rename": ("rename", 1, 3),
    "os.remove": ("remove", 0, 1),
    "os.rmdir": ("remove", 0, 1),
    "os.mkdir": ("mkdir", 0, 2),
    "os.chmod": ("chmod", 0, 2),
    "os.utime": ("chmod", 0, 3),
    "os.link": ("link", 1, 3),
    "os.symlink": ("link", 1, 2),
    "os.truncate": ("write", 0, None),
    "shutil.rmtree": ("remove", 0, 1),
}
"""Audit events that change files: the name in a point, and the positions of the path and its directory descriptor."""


@dataclass(frozen=True)
class Point:
    """A moment of a run and the action at that moment."""

    event: str
    """``write``, ``rename``, ``remove``, ``mkdir``, ``chmod``, ``link``, ``change`` for any of these, or ``start``."""
    what: str = "*"
    """A pattern for the changed path, relative to the checkout, or for the command of the started program."""
    nth: int = 1
    """The number of the event among those that match, from 1."""
    after: bool = False
    """If true, act at the next event of any kind, when this one is complete."""
    program: str = ""
    """Also wait until a program of this name runs as a descendant."""
    file: str = ""
    """Also wait until a file that matches this pattern exists in the checkout."""
    seconds: float = 0
    """Also wait this many seconds."""
    way: str = "SIGKILL"
    """The signal to send, ``fill`` to fill the disk, or ``count`` to do nothing."""
    journal: str = ""
    """A file outside the checkout for the report to the test; see :meth:`Watch.tell`."""
    trace: bool = False
    """If true, print each event, to find new points."""


class Watch:
    """Counts the events of a run until its point is reached."""

    def __init__(self, point: Point, root: Path) -> None:
        self.point = point
        self.root = str(root)
        self.seen = 0
        self.armed = self.over = self.busy = False
        self.reached = ""
        self.synced: list[list[int]] = []
        self.everything = 0

    def hook(self, event: str, words: tuple[Any, ...]) -> None:
        """Handle one audit event."""
        if self.over or self.busy:
            return
        self.busy = True  # ignore events of this handler
        try:
            self.take(event, words)
        finally:
            self.busy = False

    def take(self, event: str, words: tuple[Any, ...]) -> None:
        if self.armed:
            self.strike()
            return
        for kind, what in self.changes(event, words):
            if self.point.trace:
                os.write(2, f"event {kind} {what}\n".encode())
            if kind != self.point.event and (self.point.event, kind == "start") != ("change", False):
                continue
            if not fnmatch.fnmatch(what, self.point.what):
                continue
            self.seen += 1
            if self.seen == self.point.nth and self.point.way != "count":
                self.reached = f"{kind} {what}"
                if self.point.program or self.point.file or self.point.seconds:
                    self.over = True
                    threading.Thread(target=self.wait, daemon=True).start()
                elif self.point.after:
                    self.armed = True
                else:
                    self.strike()
                return

    def changes(self, event: str, words: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
        """Yield the changes of an audit event in the checkout, or the program that it starts."""
        if event == "subprocess.Popen":
            yield "start", " ".join(os.fsdecode(word) for word in words[1])
        elif event == "open":
            if isinstance(words[2], int) and words[2] & WRITING and (path := self.inside(words[0], None)):
                yield "write", path
        elif event in CHANGES:
            kind, place, folder = CHANGES[event]
            if path := self.inside(words[place], None if folder is None else words[folder]):
                yield kind, path

    def inside(self, path: Any, folder: int | None) -> str | None:
        """Return the path relative to the checkout; empty if it is elsewhere."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return None
        if isinstance(folder, int) and folder >= 0:
            path = Path(f"/proc/self/fd/{folder}").readlink() / os.fsdecode(path)
        name = os.path.relpath(os.fsdecode(path), self.root)
        return None if name.startswith("..") else name

    def wait(self) -> None:
        """Wait until the program runs, the file exists and the time has passed; then act."""
        deadline = time.monotonic() + 60
        while not self.ready() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(self.point.seconds)
        self.strike()

    def ready(self) -> bool:
        """Return True if the program runs and the file exists."""
        if self.point.program:
            return runs(self.point.program, psutil.Process())
        try:
            return not self.point.file or any(Path(self.root).glob(self.point.file))
        except OSError:  # a folder was removed during the search
            return False

    def strike(self) -> None:
        """Perform the point's action."""
        self.over = True
        self.tell()
        if self.point.way == "fill":
            fill(Path(self.root, "ballast"))
        else:
            os.kill(os.getpid(), getattr(signal, self.point.way))

    def tell(self) -> None:
        """Write the journal: the event that was reached, the count, and the synced files with their state."""
        found = {"reached": self.reached, "events": self.seen, "synced": self.synced, "everything": self.everything}
        Path(self.point.journal).write_text(json.dumps(found))

    def listen_to_fsync(self) -> None:
        """Record synced files, for which Python has no audit event: a power cut does not change them."""
        fsync, sync = os.fsync, os.sync

        def synced(file: Any) -> None:
            fsync(file)
            state = os.fstat(file if isinstance(file, int) else file.fileno())
            self.synced.append([state.st_ino, state.st_size, state.st_mtime_ns])

        def all_synced() -> None:
            began = time.time_ns()
            sync()
            self.everything = began

        os.fsync, os.sync = synced, all_synced


def runs(program: str, parent: psutil.Process) -> bool:
    """Return True if a program of this name is a descendant of a process."""
    for process in parent.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name() == program:
                return True
    return False


def fill(path: Path) -> None:
    """Write to ``path`` until the disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for block in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\xff" * block):
                    pass


def main() -> None:
    """Run doit with these words under the watch."""
    from doit.doit_cmd import DoitMain

    point = Point(**json.loads(sys.argv[1]))
    sys.argv = ["doit", *sys.argv[2:]]
    watch = Watch(point, Path.cwd())
    watch.listen_to_fsync()
    if point.way == "count":
        atexit.register(watch.tell)
    sys.addaudithook(watch.hook)
    sys.exit(DoitMain().run(sys.argv[1:]))


def as_json(point: Point) -> str:
    """Return the point in the form that :func:`main` reads."""
    return json.dumps(asdict(point))


if __name__ == "__main__":
    main()
