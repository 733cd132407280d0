"""Patches: the series of a package, applied by GNU patch without fuzz."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from voltforge.errors import VoltforgeError, listed, remedy
from voltforge.system import files
from voltforge.system.process import ProgramFailed, run


class PatchError(VoltforgeError):
    """A patch does not apply; the error names the file and the hunks."""

    def __init__(self, patch: Path, rejects: Sequence[tuple[str, str]]) -> None:
        where = listed([f"{file}: {why}" for file, why in rejects])
        again = _recheck(patch)
        super().__init__(
            f"{patch.parent.name}/{patch.name} does not apply:{where}",
            hint=remedy(where, f"the tree is unchanged; check these places in the source: {again}"),
        )
        self.patch = patch
        self.rejects = tuple(rejects)
        """Pairs of a file in the tree and the hunk, in patch(1)'s words."""


@dataclass(frozen=True)
class Patch:
    """One patch of a series: a header with the reason, ``---``, and a unified diff."""

    path: Path
    subject: str
    sha256: str


def series(folder: Path) -> tuple[Patch, ...]:
    """Return the patches of a folder in the order of their names; none if the folder does not exist.

    Raises:
        PatchError: a patch has no ``Subject:`` line or no diff.
    """
    patches = []
    for path in sorted(folder.glob("*.patch")):
        text = path.read_text(encoding="utf-8", errors="replace")
        subject = re.search(r"^Subject: (.+)$", text, re.MULTILINE)
        if not subject or not re.search(r"^--- .*\n\+\+\+ ", text, re.MULTILINE):
            raise PatchError(path, [("its header", "needs a line 'Subject: …' and a unified diff after it")])
        patches.append(Patch(path, subject[1].strip(), files.sha256(path)))
    return tuple(patches)


def apply(patch: Patch, folder: Path) -> None:
    """Apply one patch without fuzz, with GNU patch; a failed patch changes nothing.

    Raises:
        PatchError: names each file and hunk that did not apply.
    """
    words = ["patch", "--strip=1", "--fuzz=0", "--force", "--no-backup-if-mismatch", "--reject-file=-",
             f"--directory={folder.absolute()}", f"--input={patch.path.absolute()}"]  # fmt: skip
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C",
    }
    try:
        run([*words, "--dry-run"], env=environment)
        run(words, env=environment)
    except ProgramFailed as error:
        if error.status is None:
            raise VoltforgeError("GNU patch is not installed", hint="apt-get install patch") from error
        raise PatchError(patch.path, list(_rejects(error.output))) from error


def _recheck(patch: Path) -> str:
    """Return the places that a patch's header names for re-checking; without them, the upstream places of the patch."""
    header = patch.read_text(encoding="utf-8", errors="replace").split("\n---")[0] if patch.is_file() else ""
    for field in ("Re-check", "Upstream"):
        if found := re.search(rf"^{field}: (.+(?:\n[ \t].+)*)", header, re.MULTILINE):
            return " ".join(found[1].split())
    return "the places that it names"


def _rejects(output: str) -> Iterator[tuple[str, str]]:
    file, found = "the patch", False
    for line in output.splitlines():
        if named := re.match(r"(?:patching|checking) file '?(.+?)'?$", line):
            file = named[1]
        elif re.match(r"Hunk #\d+ FAILED|.*ignored|.*malformed|can't find file", line):
            found = True
            yield file, line.strip()
    if not found:
        yield file, (output.strip().splitlines() or ["patch printed nothing"])[-1]
