"""An S3 bucket as an object cache: rclone serves it to ccache as WebDAV, until this process ends.

ccache speaks redis and HTTP, rclone speaks S3. Credentials and endpoint come from the variables that AWS's own tools
read.
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
from voltforge.system.process import ProgramFailed, run
from voltforge.system.urls import redacted

SCHEME = "s3"
TIMEOUT = 30.0
"""Seconds for the bucket to answer, and then for rclone to listen."""
MISSING_FOLDER = "voltforge-asks"
"""A folder that does not exist: listing it tests the access and nothing else."""
LISTING_AGE = "1m"
"""The time for which rclone reuses a listing of the bucket. Objects of other hosts appear after it."""
NO_RETRIES = "--low-level-retries", "1", "--retries", "1", "--contimeout", "5s", "--timeout", "10s"
"""A failing cache is bypassed at once instead of retried."""
_ADDRESS = re.compile(r"http://(127\.0\.0\.1:\d+)/")


def serve(address: str, environ: Mapping[str, str] = os.environ) -> str:
    """Start a WebDAV server for a bucket and return its address, with a password: ``s3://bucket/folder``.

    Raises:
        VoltforgeError: rclone is not installed, or cannot reach the bucket.
    """
    rclone, setpriv = shutil.which("rclone"), shutil.which("setpriv")
    if not rclone or not setpriv:
        hint = distro.install_command(["rclone", "util-linux"])
        raise VoltforgeError(f"{redacted(address)} needs rclone, which is not installed", hint=hint)
    password = secrets.token_urlsafe(24)  # other users of this machine can reach the port
    environment = {**variables(environ), "RCLONE_USER": "voltforge", "RCLONE_PASS": password}
    remote = f":{SCHEME}:{address.removeprefix(f'{SCHEME}://')}"
    try:
        run([rclone, "lsf", f"{remote}/{MISSING_FOLDER}", *NO_RETRIES], env=environment, timeout=TIMEOUT)
    except ProgramFailed as error:
        raise _unreachable(address, error.output) from error
    # The kernel ends rclone with this process, however it ends (prctl(2), PR_SET_PDEATHSIG).
    words = [setpriv, "--pdeathsig", "TERM", rclone, "serve", "webdav", remote, "--addr", "127.0.0.1:0", *NO_RETRIES]
    words += ["--dir-cache-time", LISTING_AGE]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip
        deadline = time.monotonic() + TIMEOUT
        while child.poll() is None and time.monotonic() < deadline:
            if address_line := _ADDRESS.search(_output(log.fileno())):
                return f"http://voltforge:{password}@{address_line[1]}"
            time.sleep(0.05)
        child.kill()
        raise _unreachable(address, _output(log.fileno()))


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of rclone: ``environ`` with the region, endpoint and certificates of AWS's tools.

    rclone's own variables (``RCLONE_S3_…``) override them. rclone's configuration file is ignored, because it differs
    between users.
    """
    inherited = {name: value for name, value in environ.items() if name != "AWS_CA_BUNDLE"}
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL", "")
    derived = {
        "RCLONE_S3_ENV_AUTH": "true",
        "RCLONE_S3_PROVIDER": "Other" if endpoint else "AWS",
        "RCLONE_S3_ENDPOINT": endpoint,
        "RCLONE_S3_REGION": environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION", ""),
        "RCLONE_CA_CERT": environ.get("AWS_CA_BUNDLE", ""),  # rclone 1.60 fails to start if the SDK reads that variable
        "RCLONE_CONFIG": os.devnull,
    }
    return {**{name: value for name, value in derived.items() if value}, **inherited}


def _output(log: int) -> str:
    return os.pread(log, 1 << 16, 0).decode(errors="replace")


def _unreachable(address: str, output: str) -> VoltforgeError:
    lines = [re.sub(r"^[\d/]+ [\d:]+ ", "", line) for line in output.splitlines() if "Failed to" not in line]
    return VoltforgeError(
        f"{redacted(address)} cannot be reached: {' '.join(' '.join(lines).split())[:300] or 'rclone printed nothing'}",
        hint="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL",
    )
