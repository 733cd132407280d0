"""A stage: work whose result is recorded under the key of everything that can change it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from voltforge import PIPELINE_VERSION
from voltforge.errors import VoltforgeError, listed
from voltforge.system import files, records

T = TypeVar("T")
Values = Mapping[str, Any]
"""JSON values by name."""
WIDTH = 120
"""Characters of an input that are printed; a SHA-256 has 64."""


class NotRun(VoltforgeError):  # noqa: N818 - it says what happened
    """The result of a stage was needed before the stage had run."""


class Changed(VoltforgeError):  # noqa: N818 - it says what happened
    """An input of a stage changed: while the stage was running, or after the stage that made it."""

    def __init__(self, name: str, changes: Sequence[Change]) -> None:
        lines = listed([str(change) for change in changes])
        super().__init__(f"inputs of {name} changed during the run; nothing was recorded:{lines}", hint="run it again")
        self.changes = tuple(changes)


@dataclass(frozen=True)
class Change:
    """An input with two values; ``None`` where the input is missing on one side."""

    name: str
    """The keys from the outside in, joined by dots: ``patches.0001-imports.patch``."""
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name}: {shown(self.old)} -> {shown(self.new)}"


@dataclass(frozen=True)
class Record(Generic[T]):
    """The last finished run of a stage."""

    key: str
    inputs: Values
    result: T
    seal: Any
    """The state of the files that the result names, taken when the stage finished."""


@dataclass(frozen=True)
class Stage(Generic[T]):
    """One step of one package, with a result of type ``T``.

    The record is written last: a stage without a record did not finish. doit's own state file, which a killed run
    loses, decides nothing.
    """

    name: str
    """The name of the doit task: ``tree:vllm``."""
    path: Path
    """The file of the record."""
    root: Path
    """The checkout; paths in the record are relative to it."""
    result_type: type[T]
    """The dataclass of the result."""
    inputs: Callable[[], Values]
    """Return everything that can change the result, by name. Called before and after the work."""
    make: Callable[[str], T]
    """Do the work for a key and return the result."""
    seal: Callable[[T], Any] = lambda _: None
    """Return the state of the files that a result names, as JSON; an ``OSError`` means that they are missing."""
    after: Callable[[], Sequence[Stage[Any]]] = lambda: ()
    """Return the stages that must run before this one."""
    unless: Callable[[], bool] = lambda: False
    """Return True while later results make this stage unnecessary: a kept wheel needs no build tree."""

    def key(self, inputs: Values | None = None) -> str:
        """Return the digest of inputs (by default the present ones), the stage's name and the pipeline's version."""
        inputs = dict(self.inputs() if inputs is None else inputs)
        return files.digest({"pipeline": PIPELINE_VERSION, "stage": self.name, "inputs": inputs})

    def record(self) -> Record[T] | None:
        """Return the record of the last finished run, or ``None`` if there is none or it cannot be read."""
        value = files.read_json(self.path)
        try:
            result = records.decode(self.result_type, value["results"], self.root)
            return Record(str(value.get("key")), dict(value.get("inputs") or {}), result, value.get("seal"))
        except (TypeError, KeyError, ValueError, AttributeError):
            return None

    def finished(self) -> Record[T]:
        """Return the record of the last finished run.

        Raises:
            NotRun: there is none.
        """
        record = self.record()
        if record is None:
            raise NotRun(f"{self.name} has not run", hint=f"./doit {self.name}")
        return record

    def result(self) -> T:
        """Return the result of the last finished run.

        Raises:
            NotRun: there is none.
        """
        return self.finished().result

    def current(self) -> bool:
        """True if the record matches the present inputs, or if later results make the stage unnecessary."""
        if self.unless():
            return True
        try:
            record = self.record()
            return record is not None and record.key == self.key() and self._is_sealed(record)
        except VoltforgeError:
            return False  # stale if its inputs cannot be computed

    def run(self) -> None:
        """Do the work and write the record, unless the stage is current.

        Raises:
            NotRun: a stage that must run before has not.
            Changed: an input of this stage or of one before it changed meanwhile; nothing is recorded.
        """
        if self.current():
            return
        self._check_stages_before()
        inputs = dict(self.inputs())
        key = self.key(inputs)
        self.path.unlink(missing_ok=True)
        result = self.make(key)
        seal = self.seal(result)
        self._check_stages_before()
        if changes := [*changed(inputs, self.inputs())]:
            raise Changed(self.name, changes)
        os.sync()  # the record must not reach the disk before the files that it names
        results = records.encode(result, self.root)
        files.write_json(
            self.path, {"stage": self.name, "key": key, "inputs": inputs, "results": results, "seal": seal}
        )

    def required(self) -> T:
        """Run the stage even if later results make it unnecessary, and return its result.

        Raises:
            VoltforgeError: as :meth:`run`.
        """
        replace(self, unless=lambda: False).run()
        return self.result()

    def changes(self) -> list[Change]:
        """Return the inputs that differ from those of the last finished run.

        Raises:
            NotRun: it has no record, or a stage that provides an input has none.
        """
        return [*changed(self.finished().inputs, self.inputs())]

    def reason(self) -> str:
        """Return why the stage would run now, other than by changed inputs; empty if nothing else would make it run.

        Raises:
            VoltforgeError: an input cannot be computed.
        """
        record = self.record()
        if record is None:
            return "it has not run here, or did not finish"
        if self.changes():
            return ""
        if record.key != self.key():
            return "it ran in another version of the pipeline"
        return "" if self._is_sealed(record) else "a file that it made is missing or was changed"

    def _is_sealed(self, record: Record[T]) -> bool:
        try:
            return files.digest(self.seal(record.result)) == files.digest(record.seal)
        except OSError:
            return False

    def _check_stages_before(self) -> None:
        """Check that the stages before this one have run, for their present inputs, and that their results exist."""
        for stage in self.after():
            changes = stage.changes()
            if not changes and not stage._is_sealed(stage.finished()):
                changes = [Change(f"the result of {stage.name}", "complete", "changed or missing")]
            if changes:
                raise Changed(self.name, changes)


def changed(old: Any, new: Any, name: str = "") -> Iterator[Change]:
    """Yield the differences between two JSON values by their keys; lists are compared as a whole."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from changed(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif files.digest(old) != files.digest(new):
        yield Change(name, old, new)


def shown(value: Any) -> str:
    """Return an input for people to read: text as it is, other values as JSON, cut at :data:`WIDTH`."""
    if value is None:
        return "(none)"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}…"
