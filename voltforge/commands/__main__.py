"""`./doit`: doit with our help and our messages for mistyped words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from doit.cmdparse import CmdParseError
from doit.doit_cmd import DoitMain
from doit.exceptions import InvalidCommand, InvalidDodoFile, InvalidTask

from voltforge.commands import help
from voltforge.commands.command_line import did_you_mean

MISUSED = 3
"""The exit status of a command line that cannot be run, as doit has it."""


class _PlainErrors:
    """Adds to a command of doit that it prints a mistake of the person as one sentence."""

    def parse_execute(self, words: list[str]) -> Any:
        """Run the command; return its exit status."""
        try:
            return super().parse_execute(words)  # type: ignore[misc]
        except InvalidCommand as error:
            return _refuse(self._unknown(error.not_found) if error.not_found else str(error))
        except CmdParseError:
            options = ", ".join(word for word in words if word.startswith("-"))
            return _refuse(f"unknown option or missing value: {options}\n  try: ./doit help")
        except (InvalidDodoFile, InvalidTask) as error:
            return _refuse(str(error))

    def _unknown(self, name: str) -> str:
        tasks = [task.name for task in getattr(self, "task_list", [])]
        return f"{name} is not a task{did_you_mean(name, tasks)}\n  try: ./doit help lists the tasks"


class Main(DoitMain):  # type: ignore[misc]
    """doit's own commands (run, list, clean, …), with plain messages."""

    BIN_NAME = "./doit"
    DOIT_CMDS = tuple(
        type(command.__name__, (_PlainErrors, command), {"name": command.get_name()}) for command in DoitMain.DOIT_CMDS
    )


def _refuse(message: str) -> int:
    sys.stderr.write(f"x {message}\n")
    return MISUSED


def main(words: list[str]) -> int:
    """Print the help if it is asked for, or run doit; return the exit status."""
    if words[:1] == ["help"] or {"-h", "--help"} & set(words):
        return help.print_help(Path.cwd(), [word for word in words if word not in ("help", "-h", "--help")])
    return int(Main().run(words) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
