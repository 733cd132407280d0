"""The wheelhouse: checked wheels, their receipts, and a package index.

Beside each wheel are its METADATA, a copy of its SBOM, and its provenance in a signed envelope.
"""

from __future__ import annotations

import base64
import html
import json
import shutil
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from packaging.tags import Tag, sys_tags

from voltforge.errors import VoltforgeError, remedy
from voltforge.system import files
from voltforge.wheel import provenance, signing, wheelfile
from voltforge.wheel.signing import Signer, Trust

API_VERSION = "1.1"
"""The version of the simple repository API (PEP 700)."""
METADATA, SBOM, PROVENANCE = ".metadata", ".cdx.json", ".intoto.jsonl"
"""The suffixes of the files beside a wheel (PEP 658; CycloneDX; DSSE, one envelope per line)."""


class WheelhouseError(VoltforgeError):
    """The wheelhouse cannot be written, or does not match its receipts."""


@dataclass(frozen=True)
class Wheelhouse:
    """A folder of wheels, with ``simple/`` (the index) and ``receipts/``."""

    path: Path

    def receipt(self, name: str, python: str) -> Path:
        """Return the path of the receipt of a project's wheel for a Python: ``vllm-cp311.json``."""
        return self.path / "receipts" / f"{name}-{python}.json"

    def holds(self, results: Mapping[str, Any]) -> bool:
        """Return True if the wheel of a receipt exists, byte for byte, and the index and the files beside it match."""
        file = self.path / str(results["file"])
        if not file.is_file() or files.sha256(file) != results["sha256"]:
            return False
        try:
            statement = _payload(self.beside(file, PROVENANCE).read_bytes())
            # Its hash is known, so the wheel, which can have 12,000 files, need not be opened.
            return files.sha256_bytes(statement) == results["statement"] and not self.entry_problems(results)
        except (OSError, ValueError, KeyError, TypeError):
            return False  # a receipt of an older voltforge, or an edited one

    def beside(self, path: Path, ending: str) -> Path:
        """Return the path of a file beside a wheel: its METADATA, its SBOM or its provenance."""
        return path.with_name(f"{path.name}{ending}")

    def entry(self, verified: Path) -> dict[str, Any]:
        """Return the part of a receipt that describes the wheel: file, name, version, sha256, size, and data for the
        index.

        Raises:
            WheelError: it is not a wheel.
        """
        made, document = wheelfile.Wheel.read(verified), wheelfile.sbom_bytes(verified)
        known = {"file": f"{verified.name}{SBOM}", "sha256": files.sha256_bytes(document)} if document else None
        return {"file": verified.name, "name": made.name, "version": str(made.version),
                "sha256": files.sha256(verified), "size": verified.stat().st_size, "sbom": known,
                "metadata": files.sha256_bytes(wheelfile.metadata_bytes(verified)),
                "requires_python": str(made.metadata.requires_python or "")}  # fmt: skip

    def add(self, verified: Path, statement: bytes = b"", signer: Signer | None = None) -> None:
        """Add a checked wheel, remove the project's other wheels for this Python, and write the index.

        Wheels for another Python stay: ``cp312`` beside ``cp311``. Receipts of removed wheels are removed. The
        provenance ``statement``, if given, is signed by ``signer``, if given.

        Raises:
            WheelhouseError: the folder cannot be written.
        """
        made = wheelfile.Wheel.read(verified)
        target = self.path / verified.name
        try:
            with verified.open("rb") as source, files.replacing(target) as beside:
                shutil.copyfileobj(source, beside, files.BLOCK)
            if document := wheelfile.sbom_bytes(target):
                files.write(self.beside(target, SBOM), document)
            if statement:
                files.write(self.beside(target, PROVENANCE), signing.sealed(statement, signer))
            here, its = _pythons(sys_tags()), _pythons(made.tags)
            served = its | here if its & here else its
            others = {
                one.path
                for one in self.wheels()
                if one.name == made.name and one.path != target and served & _pythons(one.tags)
            }
            self.index(without=others)
            for path in others:
                for gone in (path, *(self.beside(path, ending) for ending in (METADATA, SBOM, PROVENANCE))):
                    files.remove(gone)
            self._drop_receipts()
        except OSError as error:
            raise WheelhouseError(
                f"{self.path} could not be written: {error.strerror}",
                hint=remedy(error.strerror, "check its owner"),
            ) from error

    def sign(self, signer: Signer) -> list[str]:
        """Sign the provenance of every wheel and return the names of the wheels.

        Raises:
            SignatureError: a statement cannot be read.
        """
        signed = []
        for one in self.wheels():
            envelope = self.beside(one.path, PROVENANCE)
            if envelope.is_file():
                files.write(envelope, signing.sealed(signing.payload(envelope.read_bytes()), signer))
                signed.append(one.path.name)
        return signed

    def entry_problems(self, told: Mapping[str, Any]) -> list[str]:
        """Return the differences between a wheel's :meth:`entry` and the index and files beside it, a sentence each."""
        found, file, name = [], told["file"], told["name"]
        wanted = {METADATA: told["metadata"], **({SBOM: told["sbom"]["sha256"]} if told["sbom"] else {})}
        for ending, digest in wanted.items():
            if files.sha256_bytes(_read(self.path / f"{file}{ending}") or b"") != digest:
                found.append(f"{file}{ending} differs from the one in the wheel")
        page = files.read_json(self.path / "simple" / name / "index.json")
        if _listed(told) not in (page.get("files", []) if isinstance(page, dict) else []):
            found.append(f"the index (simple/{name}/index.json) does not list {file} with its hash")
        if f"    {_link(told)}\n".encode() not in (_read(self.path / "simple" / name / "index.html") or b""):
            found.append(f"the index (simple/{name}/index.html) does not list {file} with its hash")
        return found

    def wheel_problems(self, made: wheelfile.Wheel, trust: Trust) -> tuple[list[str], str]:
        """Return the differences between a wheel and its index, receipt, provenance and signature, and who signed it.

        If keys are trusted, one of them must have signed.
        """
        found, name, sha256 = self.entry_problems(self.entry(made.path)), made.path.name, files.sha256(made.path)
        ours = [results for _, results in self.receipts() if results.get("file") == name]
        found += [] if ours else [f"{name} has no receipt"]
        found += [f"the receipt of {name} is for other bytes" for one in ours if one.get("sha256") != sha256]
        envelope = _read(self.beside(made.path, PROVENANCE))
        if envelope is None:
            return [*found, f"{name}{PROVENANCE} is missing"], "nobody"
        try:
            statement = signing.verified(envelope, trust) if trust else signing.payload(envelope)
            said = provenance.read(statement)
            if (said.file, said.sha256) != (name, sha256):
                found.append(f"its provenance is for {said.file} with sha256 {said.sha256[:16]}…")
            if any(files.sha256_bytes(statement) != one.get("statement") for one in ours):
                found.append(f"the receipt of {name} and its provenance disagree")
        except VoltforgeError as error:
            found.append(f"{name}{PROVENANCE}: {error.what}")
        return found, "a trusted key" if trust else "nobody: no key is trusted here"

    def _drop_receipts(self) -> None:
        for path, results in self.receipts():
            file = self.path / str(results.get("file"))
            if not file.is_file() or files.sha256(file) != results.get("sha256"):
                path.unlink()

    def receipts(self) -> list[tuple[Path, Mapping[str, Any]]]:
        """Return all receipts with their results; an unreadable one has none."""
        found = [(path, files.read_json(path)) for path in sorted((self.path / "receipts").glob("*.json"))]
        return [(path, one.get("results") or {} if isinstance(one, dict) else {}) for path, one in found]

    def wheels(self) -> list[wheelfile.Wheel]:
        """Return all wheels by file name.

        Raises:
            WheelError: a wheel is malformed.
        """
        return [wheelfile.Wheel.read(path) for path in sorted(self.path.glob("*.whl"))]

    def index_problems(self) -> list[str]:
        """Return the parts of the index and the receipts without a wheel, a sentence each.

        An installer takes whatever a page offers, so every page must be exactly the one that the present wheels give.
        """
        simple, wanted = self.path / "simple", self._pages()
        there = {str(one.relative_to(simple)) for one in simple.rglob("*") if one.is_symlink() or not one.is_dir()}
        found = [f"the index has simple/{name}, but there is no such wheel" for name in sorted(there - wanted.keys())]
        for name, text in wanted.items():
            if _read(simple / name) != text.encode():
                found.append(f"the index (simple/{name}) does not match the wheels")
        for path, results in self.receipts():
            file = results.get("file")
            if not file:
                found.append(f"receipts/{path.name} names no wheel")
            elif not (self.path / str(file)).is_file():
                found.append(f"receipts/{path.name} names {file}, which does not exist")
        return found

    def index(self, *, without: Set[Path] = frozenset()) -> None:
        """Write ``simple/``: HTML (PEP 503) and JSON (PEP 691) pages with hashes, and the metadata files of PEP 658.

        Wheels in ``without`` are omitted because they are removed next; a page never names a missing file.
        """
        for made in self.wheels():
            if made.path not in without:
                files.write(self.beside(made.path, METADATA), wheelfile.metadata_bytes(made.path))
        for ending in (METADATA, SBOM, PROVENANCE):
            for stale in self.path.glob(f"*.whl{ending}"):
                if not stale.with_name(stale.name.removesuffix(ending)).exists():
                    stale.unlink()
        with files.replacing_folder(self.path / "simple") as beside:
            for name, text in self._pages(without).items():
                files.write(beside / name, text)

    def _pages(self, without: Set[Path] = frozenset()) -> dict[str, str]:
        """Return the content of ``simple/`` by the paths in it."""
        projects: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(self.path.glob("*.whl")):
            if path not in without:
                told = self.entry(path)
                projects.setdefault(told["name"], []).append(told)
        links = [f'<a href="{html.escape(name)}/">{html.escape(name)}</a><br>' for name in projects]
        pages = _page("", "Simple index", links, {"projects": [{"name": name} for name in projects]})
        for name, entries in projects.items():
            versions = sorted({told["version"] for told in entries})
            answer = {"name": name, "files": [*map(_listed, entries)], "versions": versions}
            pages |= _page(f"{name}/", f"Links for {name}", [*map(_link, entries)], answer)
        return pages


def _pythons(tags: Iterable[Tag]) -> set[tuple[str, str]]:
    """Return the Pythons of these tags, by interpreter and ABI."""
    return {(tag.interpreter, tag.abi) for tag in tags}


def _payload(envelope: bytes) -> bytes:
    """Return the payload of an envelope that we wrote; :mod:`voltforge.wheel.signing`, which checks more, is slow to
    import.
    """
    return base64.b64decode(json.loads(envelope)["payload"], validate=True)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _url(file: str) -> str:
    return f"../../{quote(file)}"  # some stores decode a bare + as a space


def _listed(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return a wheel's entry as a file of a project page, in PEP 691's format (and 700, 714)."""
    return {
        "filename": told["file"],
        "url": _url(told["file"]),
        "hashes": {"sha256": told["sha256"]},
        "size": told["size"],
        "core-metadata": {"sha256": told["metadata"]},
        "dist-info-metadata": {"sha256": told["metadata"]},
        **({"requires-python": told["requires_python"]} if told["requires_python"] else {}),
    }


def _link(told: Mapping[str, Any]) -> str:
    """Return the same entry as an anchor of PEP 503, with the attributes of PEP 658 and 714."""
    hashed = f"sha256={told['metadata']}"
    attributes = {
        "href": f"{_url(told['file'])}#sha256={told['sha256']}",
        "data-core-metadata": hashed,
        "data-dist-info-metadata": hashed,
    }
    if told["requires_python"]:
        attributes["data-requires-python"] = told["requires_python"]
    words = "".join(f' {key}="{html.escape(value)}"' for key, value in attributes.items())
    return f"<a{words}>{html.escape(told['file'])}</a><br>"


def _page(folder: str, title: str, links: list[str], answer: dict[str, Any]) -> dict[str, str]:
    """Return a page for people and for programs, by the paths of its two files."""
    lines = [f"    {link}" for link in links]
    head = f'<meta name="pypi:repository-version" content="{API_VERSION}"><title>{html.escape(title)}</title>'
    page = ["<!DOCTYPE html>", "<html>", f"  <head>{head}</head>", "  <body>", *lines, "  </body>", "</html>", ""]
    told = json.dumps({"meta": {"api-version": API_VERSION}, **answer}, indent=2) + "\n"
    return {f"{folder}index.html": "\n".join(page), f"{folder}index.json": told}
