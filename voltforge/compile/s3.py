"""A bucket of S3 as a server of objects: rclone serves it by WebDAV on this machine, as long as this process lives.

ccache speaks redis and HTTP; rclone speaks what buckets speak. Credentials and endpoint come from the variables that
AWS's own tools read.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping

from voltforge.errors import VoltforgeError
from voltforge.sources import distro
from voltforge.sources.index import redacted
from voltforge.system.process import ProgramFailed, run

SCHEME = "s3"
PATIENCE = 30.0
"""Seconds in which the bucket has to answer, and then rclone to listen."""
NOTHING = "voltforge-asks"
"""A folder that no bucket has: to list it asks for nothing but leave."""
FRESH = "1m"
"""How long a list of the bucket's objects is taken for true: what another host brings is seen after that."""
WORDS = "--low-level-retries", "1", "--retries", "1", "--contimeout", "5s", "--timeout", "10s"
"""A cache that fails is gone round, not waited for."""
_ADDRESS = re.compile(r"http://(127\.0\.0\.1:\d+)/")


def served(address: str, environ: Mapping[str, str] = os.environ) -> str:
    """The address of a WebDAV server, with the password for it, that keeps its files in a bucket: ``s3://bucket/folder``.

    Raises:
        VoltforgeError: there is no rclone, or it does not reach the bucket.
    """
    rclone, setpriv = shutil.which("rclone"), shutil.which("setpriv")
    if not rclone or not setpriv:
        hint = distro.install_command(["rclone", "util-linux"])
        raise VoltforgeError(f"{redacted(address)} needs rclone, which is not here", hint=hint)
    password = secrets.token_urlsafe(24)  # others on this machine can reach the port too
    told = {**variables(environ), "RCLONE_USER": "voltforge", "RCLONE_PASS": password}
    place = f":{SCHEME}:{address.removeprefix(f'{SCHEME}://')}"
    try:
        run([rclone, "lsf", f"{place}/{NOTHING}", *WORDS], env=told, timeout=PATIENCE)
    except ProgramFailed as error:
        raise _unreachable(address, error.output) from error
    # The kernel ends it with this process, however that ends (prctl(2), PR_SET_PDEATHSIG).
    words = [setpriv, "--pdeathsig", "TERM", rclone, "serve", "webdav", place, "--addr", "127.0.0.1:0", *WORDS]
    words += ["--dir-cache-time", FRESH]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            words, env=told, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while child.poll() is None and time.monotonic() < deadline:
            if found := _ADDRESS.search(_said(log.fileno())):
                return f"http://voltforge:{password}@{found[1]}"
            time.sleep(0.05)
        child.kill()
        raise _unreachable(address, _said(log.fileno()))


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for rclone: ``environ`` with what AWS's tools call region, endpoint and certificates.

    rclone's own variables (``RCLONE_S3_…``) count before those. Its settings file does not: a build would have others
    where another person runs it.
    """
    found = {name: value for name, value in environ.items() if name != "AWS_CA_BUNDLE"}
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL", "")
    own = {
        "RCLONE_S3_ENV_AUTH": "true",
        "RCLONE_S3_PROVIDER": "Other" if endpoint else "AWS",
        "RCLONE_S3_ENDPOINT": endpoint,
        "RCLONE_S3_REGION": environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION", ""),
        "RCLONE_CA_CERT": environ.get("AWS_CA_BUNDLE", ""),  # rclone 1.60 refuses to begin where the SDK reads that
        "RCLONE_CONFIG": os.devnull,
    }
    return {**{name: value for name, value in own.items() if value}, **found}


def _said(log: int) -> str:
    return os.pread(log, 1 << 16, 0).decode(errors="replace")


def _unreachable(address: str, said: str) -> VoltforgeError:
    lines = [re.sub(r"^[\d/]+ [\d:]+ ", "", line) for line in said.splitlines() if "Failed to" not in line]
    return VoltforgeError(
        f"{redacted(address)} cannot be reached: {' '.join(' '.join(lines).split())[:300] or 'rclone says nothing'}",
        hint="AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL say who asks, and where",
    )
