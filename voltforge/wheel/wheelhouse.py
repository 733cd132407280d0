"""The wheelhouse: a folder of verified wheels with their receipts and a package index.

Beside each wheel are its METADATA, a copy of its SBOM, and its provenance in a signed envelope.
"""

from __future__ import annotations

import base64
import html
import json
import shutil
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from packaging.tags import Tag, sys_tags

from voltforge.errors import VoltforgeError, remedy
from voltforge.system import files
from voltforge.system.known_hashes import KnownHashes
from voltforge.wheel import provenance, signing, wheelfile
from voltforge.wheel.signing import Signer, Trust

API_VERSION = "1.1"
"""The version of the simple repository API (PEP 700)."""
METADATA, SBOM, PROVENANCE = ".metadata", ".cdx.json", ".intoto.jsonl"
"""Suffixes of the files beside a wheel (PEP 658; CycloneDX; DSSE with an envelope on each line)."""


class WheelhouseError(VoltforgeError):
    """The wheelhouse cannot be written, or contradicts its receipts."""


@dataclass(frozen=True)
class Wheelhouse:
    """A folder of wheels, with ``simple/`` (the index) and ``receipts/``."""

    path: Path
    hashes: KnownHashes = field(default_factory=KnownHashes)
    """Hashes of earlier runs: :meth:`holds` does not read an unchanged wheel again."""

    def receipt(self, name: str, python: str) -> Path:
        """Return the path of a project's receipt for a Python: ``vllm-cp311.json``."""
        return self.path / "receipts" / f"{name}-{python}.json"

    def holds(self, results: Mapping[str, Any]) -> bool:
        """Return True if the wheel of a receipt exists unchanged, with matching index entries and files beside it."""
        file = self.path / str(results["file"])
        if not file.is_file() or self.hashes.sha256(file) != results["sha256"]:
            return False
        try:
            statement = _payload(self.beside(file, PROVENANCE).read_bytes())
            # The receipt has the digests of the files beside the wheel; a wheel of 12,000 files need not be opened.
            return files.sha256_bytes(statement) == results["statement"] and not self.entry_problems(results)
        except (OSError, ValueError, KeyError, TypeError):
            return False  # an incomplete receipt

    def beside(self, path: Path, ending: str) -> Path:
        """Return the path of a file beside a wheel: METADATA, SBOM or provenance."""
        return path.with_name(f"{path.name}{ending}")

    def entry(self, verified: Path) -> dict[str, Any]:
        """Return a wheel's results in its receipt: file, name, version, sha256, size, and the values for the index.

        Raises:
            WheelError: it is not a well-formed wheel.
        """
        wheel, document = wheelfile.Wheel.read(verified), wheelfile.sbom_bytes(verified)
        known = {"file": f"{verified.name}{SBOM}", "sha256": files.sha256_bytes(document)} if document else None
        return {"file": verified.name, "name": wheel.name, "version": str(wheel.version),
                "sha256": files.sha256(verified), "size": verified.stat().st_size, "sbom": known,
                "metadata": files.sha256_bytes(wheelfile.metadata_bytes(verified)),
                "requires_python": str(wheel.metadata.requires_python or "")}  # fmt: skip

    def add(self, verified: Path, statement: bytes = b"", signer: Signer | None = None) -> None:
        """Add a verified wheel, remove the project's other wheels for this Python, and rewrite the index.

        Wheels for other Pythons stay: ``cp312`` beside ``cp311``. Receipts of removed wheels are removed too. The
        provenance ``statement``, if any, is signed if there is a signer.

        Raises:
            WheelhouseError: the folder cannot be written.
        """
        wheel = wheelfile.Wheel.read(verified)
        target = self.path / verified.name
        try:
            with verified.open("rb") as source, files.replacing(target) as beside:
                shutil.copyfileobj(source, beside, files.BLOCK)
            if document := wheelfile.sbom_bytes(target):
                files.write(self.beside(target, SBOM), document)
            if statement:
                files.write(self.beside(target, PROVENANCE), signing.make_envelope(statement, signer))
            running, own = _pythons(sys_tags()), _pythons(wheel.tags)
            served = own | running if own & running else own
            replaced = {
                other.path
                for other in self.wheels()
                if other.name == wheel.name and other.path != target and served & _pythons(other.tags)
            }
            self.index(without=replaced)
            for path in replaced:
                for removed in (path, *(self.beside(path, ending) for ending in (METADATA, SBOM, PROVENANCE))):
                    files.remove(removed)
            self._drop_receipts()
        except OSError as error:
            raise WheelhouseError(
                f"{self.path} could not be written: {error.strerror}",
                hint=remedy(error.strerror, "check its owner"),
            ) from error

    def sign(self, signer: Signer) -> list[str]:
        """Sign the provenance of every wheel and return the wheels' file names.

        Raises:
            SignatureError: a statement cannot be read.
        """
        signed = []
        for wheel in self.wheels():
            envelope = self.beside(wheel.path, PROVENANCE)
            if envelope.is_file():
                files.write(envelope, signing.make_envelope(signing.unverified_payload(envelope.read_bytes()), signer))
                signed.append(wheel.path.name)
        return signed

    def entry_problems(self, entry: Mapping[str, Any]) -> list[str]:
        """List the index entries and files beside a wheel that do not match its :meth:`entry`."""
        problems, file, name = [], entry["file"], entry["name"]
        wanted = {METADATA: entry["metadata"], **({SBOM: entry["sbom"]["sha256"]} if entry["sbom"] else {})}
        for ending, digest in wanted.items():
            if files.sha256_bytes(_read(self.path / f"{file}{ending}") or b"") != digest:
                problems.append(f"{file}{ending} does not match the wheel")
        page = files.read_json(self.path / "simple" / name / "index.json")
        if _listed(entry) not in (page.get("files", []) if isinstance(page, dict) else []):
            problems.append(f"the index (simple/{name}/index.json) does not list {file} with its hash")
        if f"    {_link(entry)}\n".encode() not in (_read(self.path / "simple" / name / "index.html") or b""):
            problems.append(f"the index (simple/{name}/index.html) does not list {file} with its hash")
        return problems

    def wheel_problems(self, wheel: wheelfile.Wheel, trust: Trust) -> tuple[list[str], str]:
        """List contradictions between a wheel and its index, receipt, provenance and signature; also return the signer.

        If there are trusted keys, the signature must be by one of them.
        """
        problems, name, sha256 = self.entry_problems(self.entry(wheel.path)), wheel.path.name, files.sha256(wheel.path)
        receipts = [results for _, results in self.receipts() if results.get("file") == name]
        problems += [] if receipts else [f"{name} has no receipt"]
        problems += [
            f"the receipt of {name} has a different sha256" for receipt in receipts if receipt.get("sha256") != sha256
        ]
        envelope = _read(self.beside(wheel.path, PROVENANCE))
        if envelope is None:
            return [*problems, f"{name}{PROVENANCE} is missing"], "nobody"
        try:
            statement = signing.verified_payload(envelope, trust) if trust else signing.unverified_payload(envelope)
            attested = provenance.read(statement)
            if (attested.file, attested.sha256) != (name, sha256):
                problems.append(f"its provenance is about {attested.file} with sha256 {attested.sha256[:16]}…")
            if any(files.sha256_bytes(statement) != receipt.get("statement") for receipt in receipts):
                problems.append(f"the receipt of {name} does not match its provenance")
        except VoltforgeError as error:
            problems.append(f"{name}{PROVENANCE}: {error.what}")
        return problems, "a trusted key" if trust else "nobody: no key is trusted here"

    def _drop_receipts(self) -> None:
        for path, results in self.receipts():
            file = self.path / str(results.get("file"))
            if not file.is_file() or files.sha256(file) != results.get("sha256"):
                path.unlink()

    def receipts(self) -> list[tuple[Path, Mapping[str, Any]]]:
        """Return the paths of all receipts, each with its results; an unreadable receipt has none."""
        records = [(path, files.read_json(path)) for path in sorted((self.path / "receipts").glob("*.json"))]
        return [(path, record.get("results") or {} if isinstance(record, dict) else {}) for path, record in records]

    def wheels(self) -> list[wheelfile.Wheel]:
        """Return all wheels, sorted by file name.

        Raises:
            WheelError: a wheel is malformed.
        """
        return [wheelfile.Wheel.read(path) for path in sorted(self.path.glob("*.whl"))]

    def index_problems(self) -> list[str]:
        """List index pages and receipts that do not belong to the wheels of the wheelhouse.

        An installer takes any file that a page lists, so every page must be exactly as generated.
        """
        simple, wanted = self.path / "simple", self._pages()
        pages = {str(page.relative_to(simple)) for page in simple.rglob("*") if page.is_symlink() or not page.is_dir()}
        problems = [
            f"the index has simple/{name}, which belongs to no wheel of the wheelhouse"
            for name in sorted(pages - wanted.keys())
        ]
        for name, text in wanted.items():
            if _read(simple / name) != text.encode():
                problems.append(f"the index (simple/{name}) does not match the wheels")
        for path, results in self.receipts():
            file = results.get("file")
            if not file:
                problems.append(f"receipts/{path.name} names no wheel")
            elif not (self.path / str(file)).is_file():
                problems.append(f"receipts/{path.name} names {file}, which does not exist")
        return problems

    def index(self, *, without: Set[Path] = frozenset()) -> None:
        """Write ``simple/``: HTML (PEP 503) and JSON (PEP 691) pages with hashes, and the metadata files of PEP 658.

        ``without`` are wheels about to be removed. They leave the index first, so that no page names a missing file.
        """
        for wheel in self.wheels():
            if wheel.path not in without:
                files.write(self.beside(wheel.path, METADATA), wheelfile.metadata_bytes(wheel.path))
        for ending in (METADATA, SBOM, PROVENANCE):
            for stale in self.path.glob(f"*.whl{ending}"):
                if not stale.with_name(stale.name.removesuffix(ending)).exists():
                    stale.unlink()
        with files.replacing_folder(self.path / "simple") as beside:
            for name, text in self._pages(without).items():
                files.write(beside / name, text)

    def _pages(self, without: Set[Path] = frozenset()) -> dict[str, str]:
        """Return the content of all pages of ``simple/``, by path."""
        projects: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(self.path.glob("*.whl")):
            if path not in without:
                entry = self.entry(path)
                projects.setdefault(entry["name"], []).append(entry)
        links = [f'<a href="{html.escape(name)}/">{html.escape(name)}</a><br>' for name in projects]
        pages = _page("", "Simple index", links, {"projects": [{"name": name} for name in projects]})
        for name, entries in projects.items():
            versions = sorted({entry["version"] for entry in entries})
            answer = {"name": name, "files": [*map(_listed, entries)], "versions": versions}
            pages |= _page(f"{name}/", f"Links for {name}", [*map(_link, entries)], answer)
        return pages


def _pythons(tags: Iterable[Tag]) -> set[tuple[str, str]]:
    """Return the Pythons of a wheel's tags as pairs of interpreter and ABI."""
    return {(tag.interpreter, tag.abi) for tag in tags}


def _payload(envelope: bytes) -> bytes:
    """Decode the payload of a DSSE envelope without importing :mod:`voltforge.wheel.signing`'s slow dependencies."""
    return base64.b64decode(json.loads(envelope)["payload"], validate=True)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _url(file: str) -> str:
    return f"../../{quote(file)}"  # some stores decode a bare + as a space


def _listed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file object of a project page (PEP 691, with the keys of PEP 700 and 714)."""
    return {
        "filename": entry["file"],
        "url": _url(entry["file"]),
        "hashes": {"sha256": entry["sha256"]},
        "size": entry["size"],
        "core-metadata": {"sha256": entry["metadata"]},
        "dist-info-metadata": {"sha256": entry["metadata"]},
        **({"requires-python": entry["requires_python"]} if entry["requires_python"] else {}),
    }


def _link(entry: Mapping[str, Any]) -> str:
    """Return an anchor of a project page (PEP 503, with the attributes of PEP 658 and 714)."""
    hashed = f"sha256={entry['metadata']}"
    attributes = {
        "href": f"{_url(entry['file'])}#sha256={entry['sha256']}",
        "data-core-metadata": hashed,
        "data-dist-info-metadata": hashed,
    }
    if entry["requires_python"]:
        attributes["data-requires-python"] = entry["requires_python"]
    words = "".join(f' {key}="{html.escape(value)}"' for key, value in attributes.items())
    return f"<a{words}>{html.escape(entry['file'])}</a><br>"


def _page(folder: str, title: str, links: list[str], answer: dict[str, Any]) -> dict[str, str]:
    """Return the HTML and the JSON page of a folder, by path."""
    lines = [f"    {link}" for link in links]
    head = f'<meta name="pypi:repository-version" content="{API_VERSION}"><title>{html.escape(title)}</title>'
    page = ["<!DOCTYPE html>", "<html>", f"  <head>{head}</head>", "  <body>", *lines, "  </body>", "</html>", ""]
    text = json.dumps({"meta": {"api-version": API_VERSION}, **answer}, indent=2) + "\n"
    return {f"{folder}index.html": "\n".join(page), f"{folder}index.json": text}
