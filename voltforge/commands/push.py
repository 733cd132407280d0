"""`./doit push`: upload the wheels of the wheelhouse to the shared cache."""

from __future__ import annotations

from voltforge.errors import VoltforgeError
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console
from voltforge.wheel.wheelhouse import PROVENANCE


def push_wheels(pipeline: Pipeline) -> None:
    """Upload each wheel that the shared cache lacks.

    Raises:
        VoltforgeError: no cache is configured, it refuses a wheel, or a wheel is not signed.
    """
    cache = pipeline.cache
    if not cache:
        raise VoltforgeError(
            "VOLTFORGE_CACHE names no shared cache", hint="VOLTFORGE_CACHE=https://host/path ./doit push"
        )
    house = pipeline.wheelhouse
    built = [results for _, results in house.receipts() if results.get("build_key")]
    if not built:
        raise VoltforgeError("the wheelhouse holds no wheel to push", hint="./doit wheels")
    for results in built:
        path = house.path / results["file"]
        uploaded = cache.put(results["build_key"], path, house.beside(path, PROVENANCE).read_bytes())
        console.note(f"{path.name}: {'uploaded to' if uploaded else 'already in'} {cache}")
