"""Forward TCP connections of a sandbox without network to one server: ``tunnel.py PORT SOCKET COMMAND …``.

The child forwards connections to 127.0.0.1:PORT to a Unix socket that the sandbox shows; the parent becomes the
command. This file imports nothing of voltforge, because it runs in the build's own Python.
:mod:`voltforge.compile.object_cache` is at the other end of the socket.
"""

import contextlib
import os
import socket
import sys
import threading

BLOCK = 1 << 16


def join(one: socket.socket, other: socket.socket) -> bool:
    """Forward data both ways between two connections until one ends. Return True if ``other`` sent the last data.

    That is False if ``other`` hangs up before it answers.
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
    """Connect each client of a listening socket to the Unix socket at ``path``."""
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
    """Start the forwarding child, and become the command."""
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
