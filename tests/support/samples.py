"""Samples for tests: shared objects made by gcc, device code in nvcc's layout, wheels."""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

from voltforge.binary import fatbin
from voltforge.wheel.wheelfile import normalise

EPOCH = 1_700_000_000
METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}"
WHEEL = "Wheel-Version: 1.0\nGenerator: a backend (1.2.3)\nRoot-Is-Purelib: false\nTag: {tag}\n"

REGISTERED = """
    __attribute__((visibility("hidden"))) extern const struct wrapper {
        unsigned magic, version; const unsigned char *data; const void *more;
    } wrappers[];
    static const char *const words[] = {"far", "behind"};
    const unsigned char *code_of(int number) { return wrappers[number].data; }
    const char *word(int number) { return words[number]; }
"""


def compiled(path: Path, source: str, *flags: str) -> Path:
    """Compile a shared object from C source, or a program with ``-pie`` among the flags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = [] if "-pie" in flags else ["-shared", "-fPIC"]
    command = ["gcc", "-x", "c", "-", "-x", "none", *kind, "-o", str(path), *flags]
    subprocess.run(command, input=source, text=True, check=True)
    return path


def image(arch: int, *, kind: int = 2, payload: bytes = b"\x7fELF....", flags: int = 0x11, packed: int = 0) -> bytes:
    """Return an entry of a fatbin as nvcc 12.8 writes it; ``packed`` is the compressed size."""
    size = len(payload) * 3 if packed else 0
    head = struct.pack("<HHIQIIHHIIIQQQ", kind, 0x101, 64, len(payload), packed, 0, 7, 1, arch, 0, 0, flags, 0, size)
    return head + payload


def container(*images: bytes) -> bytes:
    """Return a fatbin: the device images of one translation unit."""
    body = b"".join(images)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def with_device_code(path: Path, code: bytes, *, section: str = ".nv_fatbin", source: str = "") -> Path:
    """Compile a shared object with these bytes as device code. It is synthetic, for machines without nvcc."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.with_suffix(".fatbin")
    raw.write_bytes(code)
    assembly = f'.pushsection {section},\\"a\\"\\n.incbin \\"{raw}\\"\\n.popsection'
    compiled(path, f'__asm__("{assembly}");\n{source}')
    raw.unlink()
    return path


def payload(seed: int, size: int = 9000) -> bytes:
    """Return the same bytes for the same seed; they compress badly, like a compressed cubin."""
    return hashlib.shake_128(bytes([seed])).digest(size // 8 * 8)


def registered(
    path: Path, *containers: bytes, flags: tuple[str, ...] = (), source: str = "", wrappers: str | None = None
) -> Path:
    """Compile a shared object with these fatbins, registered as by nvcc. It is synthetic, for machines without nvcc.

    ``wrappers`` is the assembly of ``.nvFatBinSegment``; without it each fatbin has a wrapper, in order.
    """
    code = ""
    for number, data in enumerate(containers):
        raw = path.with_suffix(f".{number}")
        raw.write_bytes(data)
        code += f'.balign 8\\nfatbin{number}:\\n.incbin \\"{raw}\\"\\n'
    if wrappers is None:
        wrappers = "".join(f".long 0x466243b1, 1\\n.quad fatbin{number}, 0\\n" for number in range(len(containers)))
    assembly = f'.pushsection .nv_fatbin,\\"a\\"\\n{code}.popsection\\n'
    table = f".hidden wrappers\\n.globl wrappers\\nwrappers:\\n{wrappers}"
    assembly += f'.pushsection .nvFatBinSegment,\\"aw\\"\\n.balign 8\\n{table}.popsection'
    return compiled(path, f'__asm__("{assembly}");\n{REGISTERED}{source}', "-Wl,--build-id", *flags)


def two_units(path: Path, **more) -> Path:
    """Compile a library with two fatbins with code for 7.0, 8.0 and 9.0; the second also has PTX."""
    return registered(
        path,
        container(image(70, payload=payload(1)), image(80, payload=payload(2)), image(90, payload=payload(3))),
        container(
            image(80, payload=payload(4)), image(70, payload=payload(5, 16)), image(90, payload=payload(6)),
            image(90, kind=1, payload=payload(7)), image(90, payload=payload(8), flags=0x100011),
        ),
        **more,
    )  # fmt: skip


def cubin_hashes(path: Path, *names: str) -> list[tuple[int, str, str]]:
    """Return container, name and SHA-256 of the device images of a file, or of those with the given names."""
    rows = [(image.container, image.name, image.sha256()) for image in fatbin.images(path)]
    return [row for row in rows if row[1] in names] if names else rows


def listed_by_cuobjdump(toolchain, path: Path) -> dict[str, int]:
    """Return the number of images of each arch that cuobjdump finds in a file."""
    words = [toolchain.home / "bin/cuobjdump", "-lelf", path]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return dict(Counter(re.findall(r"(sm_\w+)\.cubin", printed)))


def tree(folder: Path, content: dict[str, str | bytes | Path]) -> Path:
    """Write these files into a folder, given as text, as bytes, or as a file to copy."""
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
    """Write an unpacked wheel without RECORD, as a build backend has it before packing."""
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
    """Write a well-formed wheel into ``folder``."""
    source = unpacked(folder / "unpacked", content, name=name, version=version, tag=tag, metadata=metadata)
    return normalise(source, folder, tag=tag, epoch=EPOCH)


def loads(path: Path) -> bool:
    """Return True if the real dynamic linker loads a file and finds all its symbols."""
    script = "import ctypes, os, sys; ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW)"
    return subprocess.run([sys.executable, "-c", script, path], capture_output=True).returncode == 0
