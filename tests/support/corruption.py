"""Damaged input for tests: mutated bytes, malicious archives, and limits on the code that reads them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import socketserver
import stat
import struct
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from voltforge.errors import VoltforgeError

EPOCH = 1_700_000_000
PATIENCE = 30
"""The most seconds for reading one file; reading normally takes a thousandth of it."""
MEMORY = 100_000_000
"""The most bytes by which reading a small file may increase the memory of this process."""


def cases(count: int) -> settings:
    """Return Hypothesis' settings for a number of cases without a deadline."""
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# --- limits ---


class _TooLongError(BaseException):
    """An error that readers do not catch, because it is not an Exception."""


class Room:
    """A folder with files that must not change, and a folder in it for unpacked files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.out = path / "deep" / "out"
        self.secret = path / "secret"
        (path / "deep").mkdir(parents=True)
        (path / "folder").mkdir()
        (path / "folder" / "file").write_bytes(b"theirs")
        self.secret.write_bytes(b"a secret")
        for each in (self.secret, path / "folder", path / "folder" / "file"):
            each.chmod(0o700)
            os.utime(each, (EPOCH, EPOCH))

    @contextlib.contextmanager
    def watched(self, error: type[VoltforgeError] = VoltforgeError, most: int | None = None) -> Iterator[list[Any]]:
        """Run the block and check its effects; give a list for the error that it raises, if any.

        It may raise only ``error``, with a printable message. It must stay within the limits of time and memory, and
        must not change anything outside ``out``. With ``most``, the unpacked files must be regular, stay inside ``out``
        and have at most that many bytes.
        """
        before = _around(self.path, self.out)
        caught: list[Any] = []
        with bounded():
            try:
                yield caught
            except error as problem:
                caught.append(problem)
                _check_sentence(problem)
            else:
                if most is not None:
                    _check_content(self.out)
        assert _around(self.path, self.out) == before
        assert most is None or _size(self.out) <= most


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail if the block takes more than :data:`PATIENCE` or :data:`MEMORY`."""
    begin = _forget_peak()
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    except _TooLongError as error:
        raise AssertionError(f"it took more than {PATIENCE} s") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert _memory("VmHWM") - begin < MEMORY


def _too_long(*_: object) -> None:
    raise _TooLongError


def _forget_peak() -> int:
    """Reset the peak memory of this process (proc(5)), and return its present memory in bytes.

    Without the permission to reset it, the peak includes earlier peaks, and the check finds less.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmHWM")


def _memory(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _around(folder: Path, out: Path) -> dict[str, tuple[Any, ...]]:
    """Return kinds, modes, times and bytes of everything in a folder outside ``out``."""
    found = {}
    for parent, folders, names in os.walk(folder):
        if Path(parent) == out.parent:
            folders[:] = [name for name in folders if name != out.name]
        for path in (Path(parent, name) for name in [*folders, *names]):
            if path != out:
                status = path.lstat()
                links = 0 if stat.S_ISDIR(status.st_mode) else status.st_nlink
                # The folder that holds `out` gets a new time when `out` is made.
                when = 0 if path == out.parent else status.st_mtime_ns
                data = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
                found[str(path)] = (status.st_mode, links, when, data)
    return found


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in _all(folder) if stat.S_ISREG(path.lstat().st_mode))


def _all(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        yield from (Path(parent, name) for name in [*folders, *names])


def _check_content(out: Path) -> None:
    for path in _all(out):
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
        if stat.S_ISLNK(mode):
            assert path.resolve().is_relative_to(out.resolve())
        elif stat.S_ISREG(mode):
            assert stat.S_IMODE(mode) in {0o644, 0o755}


def _check_sentence(problem: VoltforgeError) -> None:
    text = str(problem)
    assert text.encode()
    assert len(text) < 20_000
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


# --- bytes ---


class Field(NamedTuple):
    """A little-endian number in a file: its offset and size in bytes."""

    offset: int
    size: int


_EDITS = ("flip", "flip", "flip", "byte", "cut", "drop", "copy", "repeat", "insert", "run")


def damaged(whole: bytes, fields: Sequence[Field] = ()) -> st.SearchStrategy[bytes]:
    """Generate a file's bytes damaged in one to four places: flips, cuts, splices, runs, repetitions, limit values."""
    kinds = _EDITS + ("field",) * (12 if fields else 0)
    number = st.integers(0, (1 << 32) - 1)
    edit = st.tuples(st.sampled_from(kinds), number, number, st.integers(0, 255))
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _edited(whole, fields, edits))


def _edited(whole: bytes, fields: Sequence[Field], edits: Sequence[tuple[str, int, int, int]]) -> bytes:
    data = bytearray(whole)
    # Edits that move bytes come last, so that the offsets of fields are right until then.
    for kind, one, two, byte in sorted(edits, key=lambda edit: edit[0] not in {"field", "flip", "byte"}):
        at = one % (len(data) + 1)
        length = 1 + two % 64
        if kind == "field":
            field = fields[one % len(fields)]
            value = odd_number(two, byte, field.size * 8, len(whole))
            data[field.offset : field.offset + field.size] = value.to_bytes(field.size, "little")
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << (byte % 8)
        elif kind == "byte" and at < len(data):
            data[at] = byte
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + length]
        elif kind == "copy":
            data[at : at + length] = data[two % (len(data) + 1) :][:length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length] * byte
        elif kind == "insert":
            data[at:at] = struct.pack("<Q", two * 0x9E3779B97F4A7C15 % (1 << 64))[: 1 + byte % 8]
        elif kind == "run":
            data[at:at] = bytes([byte]) * (two % 5000)
    return bytes(data)


def odd_number(choice: int, small: int, bits: int, length: int) -> int:
    """Return a number of ``bits`` bits at a limit: an extreme, a neighbour, a small number, or a file offset."""
    top = 1 << bits
    limits = (
        0,
        1,
        small,
        top - 1,
        top - 2,
        top // 2,
        top // 2 - 1,
        length,
        length - 1,
        length + 1,
        choice,
        top - small,
    )
    return limits[choice % len(limits)] % top


# --- tar archives ---

PARTS = ("a", "b", "A", "é", "e\u0301", "d", "..", ".", "", "x" * 90, "sub", "link")
NAMES = st.one_of(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("/".join),
    st.sampled_from(
        ["/etc/evil", "../secret", "../../secret", "a\\b", "a\nb", "\x1b[2J", "caf\udce9", "a/" * 400 + "b", "y" * 300,
         "./a", "a//b", "a/", "-rf", "~", "C:\\x", "z" * 5000, "link/evil", "link/../../secret"]
    ),
)  # fmt: skip
"""Names of archive members, valid and malicious."""
TARGETS = st.one_of(
    NAMES, st.sampled_from(["../secret", "../../folder", "link/../../secret", "/", ".", "..", "a", "d"])
)
_KINDS = (
    b"0", b"0", b"0", b"5", b"5", b"2", b"2", b"1", b"\0", b"3", b"4", b"6", b"7", b"S", b"L", b"K", b"x", b"g", b"Z",
)  # fmt: skip
_SIZES = (0, 1, 5, 511, 512, 513, 3000, 1 << 33, 1 << 62, -1, -512, -1024)
_TIMES = (0, EPOCH, -1, 1 << 33, 1 << 40, 1 << 62)
_PAX = st.dictionaries(
    st.sampled_from(
        ["path", "linkpath", "size", "mtime", "uid", "atime", "hdrcharset", "GNU.sparse.map", "GNU.sparse.size",
         "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.realsize", "GNU.sparse.name", "comment"]
    ),
    st.sampled_from(
        ["1", "0", "-5", "nan", "inf", "-inf", "1e400", "1e18", "BINARY", "0,5", "0,5,9,9999999999", "../evil", "/evil",
         "a/b", "9" * 5000, "\0", "", "é", "link/x", "1.5", "0x10"]
    ),
    max_size=2,
)  # fmt: skip
_DAMAGES = ("none", "none", "none", "none", "garbage", "endless", "records", "digits")


class TarMember(NamedTuple):
    """A member of a tar archive, including those that no program writes."""

    name: str
    kind: bytes
    link: str
    size: int
    when: int
    pax: dict[str, str]
    damage: str


TAR_MEMBERS = st.builds(
    TarMember, NAMES, st.sampled_from(_KINDS), TARGETS, st.sampled_from(_SIZES), st.sampled_from(_TIMES), _PAX,
    st.sampled_from(_DAMAGES),
)  # fmt: skip
ORDINARY = st.builds(
    TarMember, st.sampled_from(["a", "b", "d/a", "d/b", "link", "sub/link", "A/x", "sub"]),
    st.sampled_from([b"0", b"0", b"5", b"2", b"1"]), TARGETS, st.sampled_from([0, 5, 600]), st.just(EPOCH), st.just({}),
    st.just("none"),
)  # fmt: skip
"""Members that are each well-formed; combinations of them can conflict."""


def tar_bytes(members: Sequence[TarMember], *, ended: bool = True) -> bytes:
    """Return a tar archive of these members with correct checksums."""
    return b"".join(map(_member_bytes, members)) + (bytes(1024) if ended else b"")


def _member_bytes(member: TarMember) -> bytes:
    before = b""
    if member.pax or member.damage in {"endless", "records", "digits"}:
        records = b"".join(_record(key, value) for key, value in member.pax.items())
        if member.damage == "endless":
            records += b"2 " * 20_000 + b"="
        elif member.damage == "records":
            records += b"7 a=bc\n" * 3000
        elif member.damage == "digits":
            records += b"1" * 60_000
        before = tar_header(b"pax", b"x", b"", len(records), EPOCH) + _padded(records)
    name, link = (text.encode("utf-8", "surrogateescape") for text in (member.name, member.link))
    for kind, text in ((b"L", name), (b"K", link)):
        if len(text) > 100:
            before += tar_header(b"././@LongLink", kind, b"", len(text) + 1, 0) + _padded(text + b"\0")
    data = b"d" * max(0, min(member.size, 5000))
    header = bytearray(tar_header(name[:100], member.kind, link[:100], member.size, member.when))
    if member.damage == "garbage":
        header[300:500] = bytes(range(200))
    return before + with_checksum(header) + _padded(data)


def _record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = next(total for total in range(len(rest), len(rest) + 9) if total == len(rest) + len(str(total)))
    return str(length).encode() + rest


def tar_header(name: bytes, kind: bytes, link: bytes, size: int, when: int) -> bytes:
    """Return a POSIX header (tar(5)); numbers too large for octal digits are in base 256, as in GNU tar."""
    numbers = _number(0o644, 8) + _number(0, 8) * 2 + _number(size, 12) + _number(when, 12)
    header = name.ljust(100, b"\0") + numbers + b" " * 8 + kind + link.ljust(100, b"\0") + b"ustar\00000"
    return with_checksum(bytearray(header.ljust(512, b"\0")))


def _number(value: int, size: int) -> bytes:
    if 0 <= value < 8 ** (size - 1):
        return f"{value:0{size - 1}o}".encode() + b"\0"
    mark = b"\x80" if value >= 0 else b"\xff"
    return mark + (value % 256 ** (size - 1)).to_bytes(size - 1, "big")


def with_checksum(header: bytearray) -> bytes:
    """Return a header with its correct checksum."""
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def tar_damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Generate a tar archive with odd values in its headers and correct checksums, or one damaged anywhere."""
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        headers = sorted({offset for one in archive for offset in (one.offset, one.offset_data - 512)})
    places = (
        (0, 100),
        (100, 8),
        (124, 12),
        (136, 12),
        (156, 1),
        (157, 100),
        (257, 8),
        (345, 155),
        (386, 24),
        (482, 13),
    )
    texts = st.sampled_from(
        [b"", b"\0", b"../x", b"/x", b"a", b"link", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777", b"-777",
         b"00000000001\0", b"x", b"g", b"S", b"1", b"2", b"5", b"L", b"V", b"\x80\0\0\0\0\0\0\0\0\0\0\5"]
    )  # fmt: skip
    edits = st.lists(st.tuples(st.sampled_from(headers), st.sampled_from(places), texts), min_size=1, max_size=3)

    def edited(chosen: list[tuple[int, tuple[int, int], bytes]]) -> bytes:
        data = bytearray(whole)
        for header, (at, size), text in chosen:
            block = data[header : header + 512]
            block[at : at + size] = text[:size].ljust(size, b"\0")
            data[header : header + 512] = with_checksum(block)
        return bytes(data)

    return st.one_of(edits.map(edited), damaged(whole))


# --- zip archives ---


def zip_fields(whole: bytes) -> list[Field]:
    """Return the number fields in the headers of a zip archive (APPNOTE 4.3): local, central, and at the end."""
    fields = []
    for mark, layout in (
        (b"PK\3\4", (2, 2, 2, 2, 2, 4, 4, 4, 2, 2)),
        (b"PK\1\2", (2, 2, 2, 2, 2, 2, 4, 4, 4, 2, 2, 2, 2, 2, 4, 4)),
        (b"PK\5\6", (2, 2, 2, 2, 4, 4, 2)),
    ):
        for match in re.finditer(re.escape(mark), whole):
            at = match.start() + 4
            for size in layout:
                if at + size <= len(whole):
                    fields.append(Field(at, size))
                at += size
    return fields


# --- ELF files ---

ELF_COUNTED = "corrupt inputs refused or survived: ELF and fatbin files"


def elf_fields(whole: bytes) -> list[Field]:
    """Return the number fields of a 64-bit ELF file that hold offsets, sizes and counts, in headers and tables.

    For device code, also the fields of wrappers, containers and images.
    """
    fields = _layout(16, (2, 2, 4, 8, 8, 8, 4, 2, 2, 2, 2, 2, 2))
    programs, sections = struct.unpack_from("<QQ", whole, 32)
    size, count, _, total = struct.unpack_from("<4H", whole, 54)
    for number in range(count):
        fields += _layout(programs + number * size, (4, 4, 8, 8, 8, 8, 8, 8))
    for number in range(total):
        at = sections + number * 64
        fields += _layout(at, (4, 4, 8, 8, 8, 8, 4, 4, 8, 8))
        kind, begin, length = struct.unpack_from("<4xI16xQQ", whole, at)
        # The first entries of a table are sufficient: all entries are read in the same way.
        for entry in range(begin, begin + min(length, 400), 8):
            if kind in {4, 6, 11, 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF}:  # RELA, DYNAMIC, DYNSYM, versions
                fields += [Field(entry, 8), Field(entry, 4), Field(entry + 4, 4), Field(entry, 2)]
    for match in re.finditer(rb"\x50\xed\x55\xba", whole):
        fields += _layout(match.start(), (4, 2, 2, 8)) + _layout(
            match.start() + 16, (2, 2, 4, 8, 4, 4, 2, 2, 4, 4, 4, 8)
        )
    for match in re.finditer(rb"\xb1\x43\x62\x46", whole):
        fields += _layout(match.start(), (4, 4, 8, 8))
    return [field for field in fields if field.offset + field.size <= len(whole)]


def _layout(at: int, sizes: Sequence[int]) -> list[Field]:
    return [Field(at + sum(sizes[:number]), size) for number, size in enumerate(sizes)]


# --- HTTP answers ---

ANSWERS_COUNTED = "corrupt inputs refused or survived: index answers"


@contextlib.contextmanager
def saying(answer: Callable[[str], Iterable[bytes]]) -> Iterator[str]:
    """Run a server on loopback that sends these bytes for a path, valid HTTP or not; give its URL.

    An endless answer is sent until the client disconnects.
    """

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                asked = self.rfile.readline().split()
                while self.rfile.readline().strip():
                    pass
                for block in answer(asked[1].decode() if len(asked) > 1 else ""):
                    self.wfile.write(block)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # clients disconnect on purpose

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
