"""Small archives and patches."""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

from voltforge.sources.patches import Patch, series

EPOCH = 1_700_000_000
NOISE = random.Random(3).randbytes(50_000)


def member(name: str, data: bytes | None = b"", *, kind: bytes = tarfile.REGTYPE, to: str = "", mode: int = 0o644):
    """A tar member and its content; a folder for ``None``."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.mtime = (tarfile.DIRTYPE if data is None else kind), to, mode, EPOCH
    info.size = len(data or b"")
    info.uid = info.gid = 54321
    return info, data or b""


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE):
    return member(name, kind=kind, to=to)


def tar(path: Path, *members, compression: str = "gz") -> Path:
    with tarfile.open(path, f"w:{compression}") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


def bundle(path: Path, content: dict[str, bytes], date=(2023, 11, 14, 22, 13, 20)) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name, date), data, zipfile.ZIP_DEFLATED)
    return path


def deb(path: Path, *members, compression: str = "xz") -> Path:
    """A Debian package, deb(5), put together by the real ar."""
    parts = path.parent / f"{path.name}.parts"
    parts.mkdir()
    (parts / "debian-binary").write_text("2.0\n")
    tar(parts / "control.tar.gz", member("./control", b"Package: x\n"))
    tar(parts / f"data.tar.{compression}", *members, compression=compression)
    names = ["debian-binary", "control.tar.gz", f"data.tar.{compression}"]
    subprocess.run(["ar", "rcD", path.absolute(), *names], cwd=parts, check=True)
    return path


def content(folder: Path) -> dict[str, bytes | str]:
    """The files of a folder: bytes, or where a link leads."""
    return {
        str(path.relative_to(folder)): f"-> {path.readlink()}" if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


LINES = [f"line {number}\n" for number in range(1, 41)]
HEADER = "Subject: say more\nWhy: it said too little.\nUpstream: none\n---\n"


def diff(old: list[str], new: list[str], name: str = "file.txt") -> str:
    """Return the output of the real diff for two versions of a file."""
    with tempfile.TemporaryDirectory() as room:
        for folder, lines in (("a", old), ("b", new)):
            Path(room, folder).mkdir()
            Path(room, folder, name).write_text("".join(lines))
        words = ["diff", "-u", "--label", f"a/{name}", "--label", f"b/{name}", f"a/{name}", f"b/{name}"]
        return subprocess.run(words, cwd=room, capture_output=True, text=True, check=False).stdout


def changed(lines: list[str], number: int, text: str = "changed\n") -> list[str]:
    return [*lines[: number - 1], text, *lines[number:]]


def patch(folder: Path, text: str, name: str = "0001-say-more.patch") -> Patch:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return next(serie for serie in series(folder) if serie.path.name == name)
