"""`./doit farm`: show the hosts that build together, or help them."""

from __future__ import annotations

import subprocess
import sys
import time

from voltforge.compile import object_cache
from voltforge.compile.farm import RENEW_SECONDS, Farm
from voltforge.errors import VoltforgeError
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console


def show_hosts(pipeline: Pipeline) -> None:
    """Print which host builds which package at the Redis server that ``ccache=`` names.

    Raises:
        VoltforgeError: ``ccache=`` names no Redis server, or the server does not answer.
    """
    farm = _farm(pipeline)
    hosts = farm.hosts()
    if not hosts:
        console.note(f"no host builds at {farm}")
        return
    rows = [(host.name, host.package, str(farm.compiled_by_host(host.build)[host.name]), host.build) for host in hosts]
    console.table("", ("host", "builds", "objects compiled", "build (hosts with the same build share objects)"), rows)


def help_hosts(pipeline: Pipeline) -> None:
    """Build every package that another host builds, until Ctrl-C.

    Raises:
        VoltforgeError: ``ccache=`` names no Redis server, or the server does not answer.
    """
    farm, helped = _farm(pipeline), set[tuple[str, str]]()
    console.step(f"help the hosts that build at {farm}, until Ctrl-C")
    while True:
        packages = {(host.name, host.build): host.package for host in farm.hosts() if host.name != farm.name}
        helped &= set(packages)
        waiting = sorted(packages[build] for build in set(packages) - helped if packages[build] in pipeline.recipes)
        if waiting:
            package = waiting[0]
            helped |= {build for build, name in packages.items() if name == package}
            command = [sys.executable, "-m", "doit", *pipeline.settings.words(), f"build:{package}"]
            if subprocess.call(command, cwd=pipeline.root):
                console.warn(f"build:{package} failed on this host; the other hosts go on without it")
        time.sleep(RENEW_SECONDS)


def _farm(pipeline: Pipeline) -> Farm:
    """Return the farm at the Redis server that ``ccache=`` names.

    Raises:
        VoltforgeError: ``ccache=`` names no Redis server, or the server does not answer.
    """
    server = object_cache.server_of(pipeline.settings.ccache)
    farm = server.farm() if server else None
    if not farm:
        raise VoltforgeError(
            "ccache= names no Redis server", hint="./doit ccache=redis://HOST farm; docs/scale.md tells how to begin"
        )
    farm.check_connection()
    return farm
