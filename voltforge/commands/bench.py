"""`./doit bench`: run the benchmarks, or chart the last build."""

from __future__ import annotations

from pathlib import Path

from voltforge.commands import dev_packages
from voltforge.commands.python import run_python
from voltforge.pipeline.pipeline import Pipeline


def run_benchmarks(root: Path) -> None:
    """Run every program in bench/ except serve.py, which needs a running server.

    Raises:
        VoltforgeError: a benchmark failed, or their packages cannot be installed.
    """
    dev_packages.install(root)
    for script in sorted({*(root / "bench").glob("*.py")} - {root / "bench" / "serve.py"}):
        run_python(root, str(script.relative_to(root)))


def chart_builds(pipeline: Pipeline) -> None:
    """Print how the time of each package's last build was spent, and draw charts in build/profile/.

    Raises:
        VoltforgeError: no package was built yet, ninja's log cannot be read, or matplotlib cannot be installed.
    """
    dev_packages.install(pipeline.root)
    from voltforge.compile import build_profile  # slow to import: every ./doit would wait for it

    build_profile.show(pipeline.root, pipeline.scratch, pipeline.scheduler.estimates)
