"""A copy of this checkout in which a test runs `./doit` as a person types it."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

RECIPE = """\
name = "thing"
version = "1.0"
summary = "a thing"

[source]
url = "{url}"
file = "thing-1.0.tar.gz"
sha256 = "{sha256}"

[build]
lock = "locks/thing.txt"

[expect]
lock = "locks/thing.txt"
"""


class CommandCheckout:
    """A copy of the files that git knows, with an environment that borrows the packages of this one."""

    def __init__(self, root: Path, repository: Path) -> None:
        self.root = root
        known = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        wanted = re.compile(
            r"voltforge/|dodo\.py|doit$|recipes/cuda|recipes/locks/(cuda|driver)|requirements(-dev)?\.txt|pyproject\.toml"
        )
        for name in subprocess.run(
            known, cwd=repository, capture_output=True, text=True, check=True
        ).stdout.splitlines():
            if wanted.match(name) and (repository / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(repository / name, root / name)
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("VOLTFORGE_", "PYTHONPATH"))}
        self.env |= {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}

    def settle(self) -> None:
        """Make `.venv` as the script would, but with the packages that run these tests, so that nothing is fetched."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.root / ".venv"], check=True)
        [packages] = (self.root / ".venv" / "lib").glob("python*/site-packages")
        (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
        for lock in ("requirements.txt", "requirements-dev.txt"):
            shutil.copy(self.root / lock, self.root / ".venv")

    def doit(self, *words: str, script: str = "./doit") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [script, *words], cwd=self.root, env=self.env, capture_output=True, text=True, check=False, timeout=120
        )

    def recipe(self, url: str, sha256: str, name: str = "thing") -> Path:
        (self.root / "recipes" / "locks" / "thing.txt").touch()
        path = self.root / "recipes" / f"{name}.toml"
        path.write_text(RECIPE.format(url=url, sha256=sha256))
        return path
