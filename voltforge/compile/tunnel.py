"""Carries connections to one address and nowhere else: ``tunnel.py PORT SOCKET COMMAND …``, for want of a network.

In a sandbox it hands what comes to 127.0.0.1:PORT to a socket that the sandbox shows, and becomes the command beside
that. It stands alone, for it runs in the build's own Python; the other end of the socket is
:mod:`voltforge.compile.object_cache`.
"""

import contextlib
import os
import socket
import sys
import threading

BLOCK = 1 << 16


def join(one: socket.socket, other: socket.socket) -> bool:
    """Carry both ways between two connections until either ends; gives whether the last that was said is an answer.

    It is not where ``other`` hangs up before it was asked anything.
    """
    last: list[socket.socket] = []

    def carry(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(BLOCK):
                last[:] = [source]
                sink.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    there = threading.Thread(target=carry, args=(one, other), daemon=True)
    there.start()
    carry(other, one)
    there.join()
    one.close()
    other.close()
    return last == [other]


def serve(door: socket.socket, path: str) -> None:
    """Join each that comes in at a door to the socket at ``path``."""
    while True:
        one, _ = door.accept()
        other = socket.socket(socket.AF_UNIX)
        try:
            other.connect(path)
        except OSError:
            one.close()
            other.close()
            continue
        threading.Thread(target=join, args=(one, other), daemon=True).start()


def main(words: list[str]) -> None:
    """Serve in a child, and become the command."""
    port, path, *command = words
    with socket.socket() as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(("127.0.0.1", int(port)))
        door.listen(128)
        if not os.fork():
            serve(door, path)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
