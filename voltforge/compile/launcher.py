"""Wait for a slot of the scheduler, then run a compiler or linker: ``launcher.py COMMAND …``.

CMake puts this program before each command (``CMAKE_<LANG>_COMPILER_LAUNCHER``). It imports only the standard library:
it runs in the Python of the build, inside the sandbox, once for each object.
"""

import os
import signal
import socket
import sys
import time

ATTEMPTS = 50
DELAY = 0.2
"""Seconds between two attempts to connect."""


def wait_for_slot(folder: str, *request: str) -> None:
    """Send a request to the scheduler at ``folder``/socket and return once it is granted.

    The request is the package, the build and the object. The slot stays taken until the last process that inherits the
    connection has ended.

    Raises:
        OSError: no scheduler grants the request.
    """
    message = ("\t".join(request) + "\n").encode(errors="surrogateescape")
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    # The address of a socket holds 108 bytes (unix(7)), and the path of the folder may be longer.
    address = f"/proc/self/fd/{descriptor}/socket"
    error = OSError("the scheduler closes the connection")
    for _ in range(ATTEMPTS):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            connection.sendall(message)
            if connection.recv(1):
                os.set_inheritable(connection.detach(), True)
                return
        except OSError as failure:
            error = failure
        connection.close()
        time.sleep(DELAY)
    raise error


def main(command: list[str]) -> int:
    """Replace this process with ``command`` once it has a slot."""
    output = command[command.index("-o") + 1] if "-o" in command[:-1] else command[-1]
    compiles = "-c" in command
    try:
        # Hosts share objects, not what is linked from them.
        build = os.environ.get("VOLTFORGE_BUILD", "") if compiles else ""
        wait_for_slot(os.environ["VOLTFORGE_GATE"], os.environ["VOLTFORGE_PACKAGE"], build, output)
    except (OSError, KeyError) as error:
        print(f"error: {output} is not built: no answer from the scheduler ({error}). Has ./doit ended?")
        return 1
    ccache = os.environ.get("VOLTFORGE_CCACHE")
    if compiles and ccache:
        command = [ccache, *command]
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores both, and exec keeps ignored signals
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: {command[0]} cannot be run: {error.strerror}")
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
