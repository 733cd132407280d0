"""`./doit serve:check`: measure a running server."""

from __future__ import annotations

from voltforge.commands import dev_packages
from voltforge.errors import VoltforgeError
from voltforge.pipeline.pipeline import Pipeline


def check_server(pipeline: Pipeline) -> None:
    """Measure the server that ``url=`` names; write a table, JSON and a plot to build/bench/serve/.

    Raises:
        VoltforgeError: no address was given, the server cannot be measured, or requests failed.
    """
    url = pipeline.settings.url
    if not url:
        raise VoltforgeError("no server address was given", hint="./doit serve:check url=http://127.0.0.1:8000")
    dev_packages.install(pipeline.root)
    from voltforge.commands import server_benchmark  # needs aiohttp, which may have been installed just now

    server_benchmark.check(url, pipeline.scratch / "bench" / "serve")
