"""Runs one command of a build when the gate lets it through: ``launcher.py COMMAND …`` (CMake's compiler launcher).

It stands alone, for it runs in the build's own Python, inside its sandbox, once for every object.
"""

import os
import signal
import socket
import sys
import time

TRIES = 50
"""How often the gate is looked for, 0.2 seconds apart."""


def asked(folder: str, *said: str) -> int:
    """Wait until the gate at ``folder``/socket lets through what ``said`` names: package, build, object.

    Gives the descriptor that says when the work has ended.

    The gate sees that by its end being closed, with the last process that has it. By way of the folder's descriptor,
    for the address of a socket holds 108 bytes (unix(7)).

    Raises:
        OSError: there is no gate.
    """
    place = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        for attempt in range(TRIES):
            gate = socket.socket(socket.AF_UNIX)
            try:
                gate.connect(f"/proc/self/fd/{place}/socket")
                gate.sendall(("\t".join(said) + "\n").encode(errors="surrogateescape"))
                if gate.recv(1):
                    os.set_inheritable(gate.fileno(), True)
                    return gate.detach()
            except OSError:
                if attempt == TRIES - 1:
                    raise
            gate.close()
            time.sleep(0.2)
    finally:
        os.close(place)
    raise ConnectionError("the gate closes before it answers")


def main(words: list[str]) -> int:
    """Become the command that ``words`` are."""
    name = words[words.index("-o") + 1] if "-o" in words[:-1] else words[-1]
    compiles, environ = "-c" in words, os.environ
    try:
        build = environ.get("VOLTFORGE_BUILD", "") if compiles else ""
        asked(environ["VOLTFORGE_GATE"], environ["VOLTFORGE_PACKAGE"], build, name)
    except (OSError, KeyError) as error:
        print(f"error: nobody lets {name} be compiled, {error}: the run of ./doit that built this is gone")
        return 1
    if compiles and environ.get("VOLTFORGE_CCACHE"):
        words = [environ["VOLTFORGE_CCACHE"], *words]
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and so would what it becomes
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(words[0], words)
    except OSError as error:
        print(f"error: {words[0]} cannot be run: {error.strerror}")
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
