"""Logs of ninja: written by hand, and by the real ninja."""

from __future__ import annotations

import subprocess
from pathlib import Path
from zlib import crc32

from voltforge.system import programs

HEADER = "# ninja log v7\n"
NINJA = """\
rule sleep
  command = sleep $seconds && cat $in /dev/null > $out
rule two
  command = touch one.h two.h
build one.h two.h: two
build headers: phony one.h two.h
build CMakeFiles/t.dir/src/long.cu.o: sleep long.cu || headers
  seconds = 0.3
build CMakeFiles/t.dir/src/short.cpp.o: sleep short.cpp || headers
  seconds = 0.01
build libt.so: sleep CMakeFiles/t.dir/src/long.cu.o | CMakeFiles/t.dir/src/short.cpp.o
  seconds = 0.05
build alone.cpp.o: sleep short.cpp
  seconds = 0.01
build all: phony libt.so alone.cpp.o
default all
"""


def line(output: str, start: int, end: int, digest: str = "") -> str:
    """Return a line of a log; times in milliseconds."""
    return f"{start}\t{end}\t1795693666233793947\t{output}\t{digest or f'{crc32(output.encode()):x}'}\n"


def write_log(folder: Path, *lines: str, header: str = HEADER) -> Path:
    """Write a log with these lines."""
    path = folder / ".ninja_log"
    path.write_text(header + "".join(lines))
    return path


def run_ninja(folder: Path) -> None:
    """Build :data:`NINJA` in a folder with two jobs."""
    (folder / "build.ninja").write_text(NINJA)
    for source in ("long.cu", "short.cpp"):
        (folder / source).touch()
    subprocess.run([programs.find("ninja"), "-C", folder, "-j2"], check=True, capture_output=True)
