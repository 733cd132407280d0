"""Tries what attempts.json beside it lists, and prints ``TRIED <number> done``, or why not, for each."""

import json
import os
import socket
import struct
from pathlib import Path

from setuptools import setup
from setuptools.command.build import build

PATIENCE = 5


def connect(host, port):
    socket.create_connection((host, port), PATIENCE).close()


def connect_by_name(name):
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(name)


def send(host, port, data="anybody?"):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        line.settimeout(PATIENCE)
        line.connect((host, port))
        line.send(data if isinstance(data, bytes) else data.encode())
        return line.recv(512)


def look_up(host, port, name):
    """A question for an A record, as RFC 1035 has it, to a name server of the machine."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    question = struct.pack(">6H", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", 1, 1)
    answer = send(host, port, question)
    assert (answer[:2], answer[6:8]) == (question[:2], b"\0\1"), "an answer to something else"


def read(path):
    assert Path(path).read_bytes()


def write(folder):
    path = Path(folder, f"voltforge-test-{os.getpid()}")
    path.write_text("was here")
    path.unlink()


def see_process(mark):
    assert any(mark.encode() in line for line in of_processes("cmdline")), "there is no such process"


def read_variable(secret):
    assert any(secret.encode() in line for line in of_processes("environ")), "nobody has such a variable"


def of_processes(name):
    for path in Path("/proc").glob(f"[0-9]*/{name}"):
        try:
            yield path.read_bytes()
        except OSError:
            continue


class Curious(build):
    def run(self):
        super().run()
        for number, (name, *words) in enumerate(json.loads(Path("attempts.json").read_text())):
            try:
                globals()[name](*words)
                outcome = "done"
            except (OSError, AssertionError) as error:
                outcome = f"{type(error).__name__}: {error}"
            print(f"TRIED {number} {outcome}", flush=True)


setup(py_modules=[], cmdclass={"build": Curious})
