"""The wheelhouse: verified wheels, the receipts that say what each was made of, and a package index over them."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from packaging.tags import Tag, sys_tags

from voltforge import files, wheel
from voltforge.errors import VoltforgeError

API_VERSION = "1.1"
"""Of the simple repository API (PEP 700)."""


class WheelhouseError(VoltforgeError):
    """The wheelhouse cannot be written, or holds what its receipts do not."""


@dataclass(frozen=True)
class Wheelhouse:
    """A folder of wheels, with ``simple/`` (the index) and ``receipts/``."""

    path: Path

    def receipt(self, name: str, python: str) -> Path:
        """Where the receipt of the wheel is that a project has for a Python: ``vllm-cp311.json``."""
        return self.path / "receipts" / f"{name}-{python}.json"

    def holds(self, results: Mapping[str, Any]) -> bool:
        """Whether the wheel of a receipt is here, byte for byte, and in the index."""
        file = self.path / str(results["file"])
        page = self.path / "simple" / str(results["name"]) / "index.html"
        return file.is_file() and page.is_file() and files.sha256(file) == results["sha256"]

    def add(self, verified: Path) -> dict[str, Any]:
        """Take a verified wheel in, drop the project's others for this Python, and renew the index.

        Wheels for another Python stay: ``cp312`` beside ``cp311``. Receipts of wheels that are no more go with them.
        Gives what the receipt says of it: file, name, version, sha256, size.

        Raises:
            WheelhouseError: the folder cannot be written.
        """
        made = wheel.Wheel.read(verified)
        target = self.path / verified.name
        try:
            with verified.open("rb") as source, files.replacing(target) as beside:
                shutil.copyfileobj(source, beside, files.BLOCK)
            here, its = _pythons(sys_tags()), _pythons(made.tags)
            served = its | here if its & here else its
            others = {
                one.path
                for one in self.wheels()
                if one.name == made.name and one.path != target and served & _pythons(one.tags)
            }
            self.index(without=others)
            for path in others:
                files.remove(path)
                files.remove(_metadata(path))
            self._drop_receipts()
        except OSError as error:
            raise WheelhouseError(
                f"{self.path} could not be written: {error.strerror}", hint="check its owner and the disk's free space"
            ) from error
        return {"file": target.name, "name": made.name, "version": str(made.version), "sha256": files.sha256(target),
                "size": target.stat().st_size}  # fmt: skip

    def _drop_receipts(self) -> None:
        for receipt in (self.path / "receipts").glob("*.json"):
            kept = files.read_json(receipt) or {}
            results = kept.get("results", {})
            file = self.path / str(results.get("file", ""))
            if not file.is_file() or files.sha256(file) != results["sha256"]:
                receipt.unlink()

    def wheels(self) -> list[wheel.Wheel]:
        """The wheels that are here, by file name.

        Raises:
            WheelError: one of them is malformed.
        """
        return [wheel.Wheel.read(path) for path in sorted(self.path.glob("*.whl"))]

    def index(self, *, without: Set[Path] = frozenset()) -> None:
        """Write ``simple/``: HTML (PEP 503) and JSON (PEP 691) pages with hashes, and the metadata files of PEP 658.

        Wheels ``without`` which it is to be are about to go: last, so that no page ever names what is not there.
        """
        projects: dict[str, list[dict[str, Any]]] = {}
        for made in self.wheels():
            if made.path in without:
                continue
            metadata = wheel.metadata_bytes(made.path)
            files.write(_metadata(made.path), metadata)
            projects.setdefault(made.name, []).append(_entry(made, files.sha256_bytes(metadata)))
        for stale in self.path.glob("*.metadata"):
            if not stale.with_suffix("").exists():
                stale.unlink()
        simple = self.path / "simple"
        with files.replacing_folder(simple) as beside:
            _page(beside, "Simple index", [(name, f"{name}/", {}) for name in projects],
                  {"projects": [{"name": name} for name in projects]})  # fmt: skip
            for name, entries in projects.items():
                links = [(entry["filename"], _hashed(entry), _attributes(entry)) for entry in entries]
                versions = sorted({str(entry.pop("version")) for entry in entries})
                _page(beside / name, f"Links for {name}", links, {"name": name, "files": entries, "versions": versions})


def _pythons(tags: Iterable[Tag]) -> set[tuple[str, str]]:
    """The Pythons that wheels with these tags are for, by interpreter and ABI."""
    return {(tag.interpreter, tag.abi) for tag in tags}


def _metadata(path: Path) -> Path:
    return path.with_name(f"{path.name}.metadata")


def _entry(made: wheel.Wheel, metadata: str) -> dict[str, Any]:
    """A file of a project page, in the words of PEP 691 (and 700, 714)."""
    entry: dict[str, Any] = {
        "filename": made.path.name,
        "url": f"../../{quote(made.path.name)}",  # some stores take a bare + for a space
        "hashes": {"sha256": files.sha256(made.path)},
        "size": made.path.stat().st_size,
        "core-metadata": {"sha256": metadata},
        "dist-info-metadata": {"sha256": metadata},
        "version": str(made.version),
    }
    if made.metadata.requires_python:
        entry["requires-python"] = str(made.metadata.requires_python)
    return entry


def _hashed(entry: Mapping[str, Any]) -> str:
    return f"{entry['url']}#sha256={entry['hashes']['sha256']}"


def _attributes(entry: Mapping[str, Any]) -> dict[str, str]:
    hashed = f"sha256={entry['core-metadata']['sha256']}"
    attributes = {"data-core-metadata": hashed, "data-dist-info-metadata": hashed}
    if "requires-python" in entry:
        attributes["data-requires-python"] = entry["requires-python"]
    return attributes


def _page(folder: Path, title: str, links: list[tuple[str, str, dict[str, str]]], answer: dict[str, Any]) -> None:
    lines = []
    for text, address, attributes in links:
        extra = "".join(f' {key}="{html.escape(value)}"' for key, value in attributes.items())
        lines.append(f'    <a href="{html.escape(address)}"{extra}>{html.escape(text)}</a><br>')
    head = f'<meta name="pypi:repository-version" content="{API_VERSION}"><title>{html.escape(title)}</title>'
    page = ["<!DOCTYPE html>", "<html>", f"  <head>{head}</head>", "  <body>", *lines, "  </body>", "</html>", ""]
    files.write(folder / "index.html", "\n".join(page))
    files.write(folder / "index.json", json.dumps({"meta": {"api-version": API_VERSION}, **answer}, indent=2) + "\n")
