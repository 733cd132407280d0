"""Small real things for tests: shared objects that gcc makes, device code laid out as nvcc does it, wheels."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from voltforge.wheel import normalise

EPOCH = 1_700_000_000
METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}"
WHEEL = "Wheel-Version: 1.0\nGenerator: a backend (1.2.3)\nRoot-Is-Purelib: false\nTag: {tag}\n"


def compiled(path: Path, source: str, *flags: str) -> Path:
    """A shared object of the C source, or a program with ``-pie`` among the flags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = [] if "-pie" in flags else ["-shared", "-fPIC"]
    command = ["gcc", "-x", "c", "-", "-x", "none", *kind, "-o", str(path), *flags]
    subprocess.run(command, input=source, text=True, check=True)
    return path


def image(arch: int, *, kind: int = 2, payload: bytes = b"\x7fELF....", flags: int = 0x11, packed: int = 0) -> bytes:
    """An entry of a fatbin as nvcc 12.8 writes it; ``packed`` is the compressed size."""
    size = len(payload) * 3 if packed else 0
    head = struct.pack("<HHIQIIHHIIIQQQ", kind, 0x101, 64, len(payload), packed, 0, 7, 1, arch, 0, 0, flags, 0, size)
    return head + payload


def container(*images: bytes) -> bytes:
    """A fatbin: what nvcc makes of one translation unit."""
    body = b"".join(images)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def with_device_code(path: Path, code: bytes, *, section: str = ".nv_fatbin", source: str = "") -> Path:
    """A shared object with these bytes where device code belongs. Made up, for where no nvcc can be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.with_suffix(".fatbin")
    raw.write_bytes(code)
    assembly = f'.pushsection {section},\\"a\\"\\n.incbin \\"{raw}\\"\\n.popsection'
    compiled(path, f'__asm__("{assembly}");\n{source}')
    raw.unlink()
    return path


def tree(folder: Path, content: dict[str, str | bytes | Path]) -> Path:
    """A folder with these files, given by text, by bytes, or by a file to copy."""
    for name, data in content.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, Path):
            data = data.read_bytes()
        file.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def unpacked(
    folder: Path,
    content: dict[str, str | bytes | Path],
    *,
    name: str = "sample",
    version: str = "1.0",
    tag: str = "py3-none-any",
    metadata: str = "",
) -> Path:
    """An unpacked wheel without RECORD, as a build backend has it before it packs."""
    dist_info = f"{name}-{version}.dist-info"
    files = {
        f"{dist_info}/METADATA": METADATA.format(name=name, version=version, more=metadata),
        f"{dist_info}/WHEEL": WHEEL.format(tag=tag),
    }
    return tree(folder, {**content, **files})


def wheel(
    folder: Path,
    content: dict[str, str | bytes | Path],
    *,
    name: str = "sample",
    version: str = "1.0",
    tag: str = "py3-none-any",
    metadata: str = "",
) -> Path:
    """A well-formed wheel in ``folder``."""
    source = unpacked(folder / "unpacked", content, name=name, version=version, tag=tag, metadata=metadata)
    return normalise(source, folder, tag=tag, epoch=EPOCH)
