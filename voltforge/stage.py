"""A stage: work whose result is kept under the key of everything that can change it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voltforge import PIPELINE_VERSION, files
from voltforge.errors import VoltforgeError

Values = Mapping[str, Any]
"""What JSON can hold, by name."""


class NotRun(VoltforgeError):  # noqa: N818 - it says what happened
    """A stage whose results are asked for before it has run."""


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
    after: tuple[str, ...] = ()
    """The stages that must have run before."""
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

        Nothing is where what is kept, here or in the stage that makes this one needless, is of today's inputs.
        """
        try:
            kept = self.kept()
            if kept and kept.get("key") == self.key() and self.intact(kept["results"]):
                return True
        except VoltforgeError:
            pass  # what cannot be asked is not current by itself
        return self.unless is not None and self.unless.current()

    def run(self) -> None:
        """Do the work and keep the record, unless there is nothing to do."""
        if self.current():
            return
        inputs = dict(self.inputs())
        key = self.key(inputs)
        self.record.unlink(missing_ok=True)
        results = self.make(key)
        files.write_json(self.record, {"stage": self.name, "key": key, "inputs": inputs, "results": dict(results)})
