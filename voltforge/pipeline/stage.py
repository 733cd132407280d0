"""A stage: work whose result is kept under the key of everything that can change it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voltforge import PIPELINE_VERSION
from voltforge.errors import VoltforgeError, listed
from voltforge.system import files

Values = Mapping[str, Any]
"""What JSON can hold, by name."""
WIDTH = 120
"""How much of a value is shown; a sha256 is 64."""


class NotRun(VoltforgeError):  # noqa: N818 - it says what happened
    """A stage whose results are asked for before it has run."""


class Changed(VoltforgeError):  # noqa: N818 - it says what happened
    """An input that is no longer what it was when the work on it began."""

    def __init__(self, name: str, changes: Sequence[Change]) -> None:
        told = listed([str(change) for change in changes])
        super().__init__(
            f"changed while {name} was at work, so that nothing of it was kept:{told}", hint="run it again"
        )
        self.changes = tuple(changes)


@dataclass(frozen=True)
class Change:
    """An input with two values; ``None`` where it is on one side only."""

    name: str
    """Its names from the outside in, with dots: ``patches.0001-imports.patch``."""
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name}: {shown(self.old)} -> {shown(self.new)}"


@dataclass(frozen=True)
class Stage:
    """One step for one package.

    Its record is written last, so a stage without one was not finished; doit's own memory of what ran, which a
    killed run loses, decides nothing.
    """

    name: str
    """As doit calls it: ``tree:vllm``."""
    record: Path
    """Where key, inputs and results are kept."""
    inputs: Callable[[], Values]
    """Everything that can change the result, by name; asked before and after the stages below have run."""
    make: Callable[[str], Values]
    """Does the work; takes the key and gives the results to keep."""
    intact: Callable[[Values], bool]
    """Whether what the results speak of is still there, as it was."""
    after: Callable[[], Sequence[Stage]] = lambda: ()
    """Gives the stages that must have run before."""
    unless: Stage | None = None
    """A later stage that makes this one needless while it is current: a kept wheel needs no build tree."""

    def key(self, inputs: Values | None = None) -> str:
        """The digest of the inputs, today's if none are given, and of the pipeline's version."""
        inputs = dict(self.inputs() if inputs is None else inputs)
        return files.digest({"pipeline": PIPELINE_VERSION, "stage": self.name, "inputs": inputs})

    def kept(self) -> Any:
        """The record as it stands, or ``None`` where there is none that can be read."""
        record = files.read_json(self.record)
        return record if isinstance(record, dict) and isinstance(record.get("results"), dict) else None

    def results(self) -> Any:
        """What :attr:`make` gave when it last ran.

        Raises:
            NotRun: it has no record.
        """
        kept = self.kept()
        if not kept:
            raise NotRun(f"{self.name} has not run", hint=f"./doit {self.name}")
        return kept["results"]

    def current(self) -> bool:
        """Whether there is nothing to do.

        Nothing is where what is kept, in the stage that makes this one needless or here, is of today's inputs.
        """
        if self.unless is not None and self.unless.current():
            return True
        try:
            kept = self.kept()
            return bool(kept and kept.get("key") == self.key() and self.intact(kept["results"]))
        except VoltforgeError:
            return False  # what cannot be asked is not current by itself

    def run(self) -> None:
        """Do the work and keep the record, unless there is nothing to do.

        Raises:
            NotRun: a stage that must have run before has not.
            Changed: an input, here or of a stage before, was changed while the work was done; nothing is kept.
        """
        if self.current():
            return
        self._stand()
        inputs = dict(self.inputs())
        key = self.key(inputs)
        self.record.unlink(missing_ok=True)
        results = self.make(key)
        self._stand()
        if changes := [*changed(inputs, self.inputs())]:
            raise Changed(self.name, changes)
        os.sync()  # a record must not be on the disk before what it speaks of
        files.write_json(self.record, {"stage": self.name, "key": key, "inputs": inputs, "results": dict(results)})

    def changes(self) -> list[Change]:
        """The inputs that are not what they were when the stage ran last, as it is kept.

        Raises:
            NotRun: it has no record, or a stage that it takes values from has none.
        """
        self.results()
        return [*changed(self.kept()["inputs"], self.inputs())]

    def reason(self) -> str:
        """In a sentence why it would run now, but for inputs that changed; empty if there is no other reason.

        Raises:
            VoltforgeError: an input cannot be asked for.
        """
        kept = self.kept()
        if not kept:
            return "it has not run here, or was not finished"
        if self.changes():
            return ""
        if kept.get("key") != self.key():
            return "it ran in another version of the pipeline"
        return "" if self.intact(kept["results"]) else "what it made is gone, or not as it was"

    def _stand(self) -> None:
        """See that what the stages before made is there, and of what this one's inputs speak of."""
        for below in self.after():
            changes = below.changes()
            if not changes and not below.intact(below.results()):
                changes = [Change(f"what {below.name} made", "whole", "changed or gone")]
            if changes:
                raise Changed(self.name, changes)


def changed(old: Any, new: Any, name: str = "") -> Iterator[Change]:
    """Where two values of JSON differ, by the names of what is in them; lists are compared as a whole."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from changed(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif files.digest(old) != files.digest(new):
        yield Change(name, old, new)


def shown(value: Any) -> str:
    """An input for people to read: text as it is, the rest as JSON, cut short."""
    if value is None:
        return "(none)"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}…"
