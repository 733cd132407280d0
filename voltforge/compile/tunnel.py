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


def join(client: socket.socket, server: socket.socket) -> bool:
    """Forward data both ways between two connections until one ends. Return True if ``server`` sent the last data.

    It is False if ``server`` hangs up before it answers.
    """
    last_sender: list[socket.socket] = []

    def forward(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(BLOCK):
                last_sender[:] = [source]
                sink.sendall(data)
        for connection in (client, server):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    requests = threading.Thread(target=forward, args=(client, server), daemon=True)
    requests.start()
    forward(server, client)
    requests.join()
    client.close()
    server.close()
    return last_sender == [server]


def serve(listener: socket.socket, path: str) -> None:
    """Connect each client of a listening socket to the Unix socket at ``path``."""
    while True:
        client, _ = listener.accept()
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(path)
        except OSError:
            client.close()
            server.close()
            continue
        threading.Thread(target=join, args=(client, server), daemon=True).start()


def main(words: list[str]) -> None:
    """Start the forwarding child, and become the command."""
    port, path, *command = words
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(port)))
        listener.listen(128)
        if not os.fork():
            serve(listener, path)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
