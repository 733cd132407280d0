"""End `./doit` in order at Ctrl-C, SIGTERM and when the terminal closes."""

from __future__ import annotations

import signal
import sys
import threading
from types import TracebackType
from typing import NoReturn

from voltforge.system import console

INTERRUPTED = 130
"""The exit status of a program that Ctrl-C ended, as shells give it."""
MESSAGE = "interrupted: finished stages are kept, the next run continues from there"


def exit_interrupted() -> NoReturn:
    """Print the message and exit with status 130."""
    console.warn(MESSAGE)
    raise SystemExit(INTERRUPTED)


def treat_signals_like_ctrl_c() -> None:
    """Raise KeyboardInterrupt at SIGTERM and SIGHUP, so that a build's own process group is ended too.

    A signal that is ignored, as nohup(1) does, stays ignored.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _interrupt)


def print_no_traceback() -> None:
    """Print the message instead of a traceback where Ctrl-C comes between two tasks."""
    sys.excepthook = _excepthook


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        console.warn(MESSAGE)
    else:
        sys.__excepthook__(kind, error, trace)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
