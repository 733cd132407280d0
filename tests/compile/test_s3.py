"""Objects in an S3 bucket: real ccache and rclone, moto's server on loopback, and missing buckets."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import requests

from tests.compile.test_object_cache import built, free_port, needs_ccache, until_it_listens
from tests.support.checkouts import PACKAGES, ROOT, small_checkout
from voltforge.compile import object_cache, s3
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Settings
from voltforge.sources import environment
from voltforge.sources.index import configured
from voltforge.system import files

# CI has it, and skips none of these.
needs_rclone = pytest.mark.skipif(not shutil.which("rclone"), reason="rclone is not installed; CI installs it")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of moto's S3, with a bucket ``objects``."""
    folder = tmp_path_factory.mktemp("moto")
    made = environment.create(PACKAGES / "moto.txt", folder / "environment", configured())
    port = free_port()
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(
            [made.path / "bin" / "moto_server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        until_it_listens(port)
        assert requests.put(f"http://127.0.0.1:{port}/objects", timeout=30).status_code == 200
        yield f"http://127.0.0.1:{port}"
    finally:
        child.kill()
        child.wait()
        files.remove(folder)


def told(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "ours", "AWS_SECRET_ACCESS_KEY": "secret",
        "PATH": os.environ["PATH"],
    }  # fmt: skip


@needs_rclone
def test_a_bucket_stores_objects_and_other_users_cannot_read_them(endpoint):
    url = s3.serve("s3://objects/here", told(endpoint))
    assert requests.put(f"{url}/one", data=b"1", timeout=30).ok
    assert requests.get(f"{url}/one", timeout=30).content == b"1"
    assert requests.get(f"{url}/other", timeout=30).status_code == 404
    assert "<Key>here/one</Key>" in requests.get(f"{endpoint}/objects", timeout=30).text
    at = urlsplit(url)
    assert requests.get(f"http://127.0.0.1:{at.port}/one", timeout=30).status_code == 401
    assert at.hostname == "127.0.0.1"


@needs_rclone
def test_rclone_ends_with_its_process_even_by_sigkill(endpoint):
    program = (
        "import time; from voltforge.compile import s3; print(s3.serve('s3://objects'), flush=True); time.sleep(60)"
    )
    environ = {**told(endpoint), "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE, text=True)
    url = child.stdout.readline().strip()
    assert requests.get(f"{url}/x", timeout=30).status_code == 404
    child.send_signal(signal.SIGKILL)
    child.communicate()
    for _ in range(500):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", urlsplit(url).port), 1):
            time.sleep(0.02)
            continue
        return
    raise AssertionError("rclone still listens")


@needs_rclone
@pytest.mark.parametrize("lost", ["the bucket", "the server"])
def test_an_unreachable_bucket_is_reported_and_the_local_cache_is_used(endpoint, lost, tmp_path, monkeypatch, capsys):
    place = endpoint if lost == "the bucket" else f"http://127.0.0.1:{free_port()}"
    for name, value in told(place).items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    made = object_cache.open_cache("s3://nobodys/objects", tmp_path / "cache")
    assert time.monotonic() - began < 60
    assert made
    assert made.server is None
    said = capsys.readouterr().out
    assert said.startswith("! s3://nobodys/objects cannot be reached: ")
    assert said.endswith(": only the cache on this disk is used\n")
    assert ("directory not found" if lost == "the bucket" else "connection refused") in said


def test_missing_rclone_is_reported_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(VoltforgeError, match=r"s3://bucket needs rclone, which is not installed") as caught:
        s3.serve("s3://bucket", {})
    assert "rclone" in caught.value.hint


def test_rclone_reads_the_aws_variables_and_its_own_override_them():
    assert s3.variables({"AWS_REGION": "eu-central-1", "AWS_CA_BUNDLE": "/ca.pem", "HOME": "/home/me"}) == {
        "RCLONE_S3_ENV_AUTH": "true", "RCLONE_S3_PROVIDER": "AWS", "RCLONE_S3_REGION": "eu-central-1",
        "RCLONE_CA_CERT": "/ca.pem", "RCLONE_CONFIG": os.devnull, "AWS_REGION": "eu-central-1", "HOME": "/home/me",
    }  # fmt: skip
    made = s3.variables({"AWS_ENDPOINT_URL": "http://a", "AWS_ENDPOINT_URL_S3": "http://b"})
    assert (made["RCLONE_S3_PROVIDER"], made["RCLONE_S3_ENDPOINT"]) == ("Other", "http://b")
    ceph = s3.variables({"AWS_ENDPOINT_URL": "http://a", "RCLONE_S3_PROVIDER": "Ceph"})
    assert ceph["RCLONE_S3_PROVIDER"] == "Ceph"


@needs_ccache
@needs_rclone
@pytest.mark.slow
def test_a_second_checkout_compiles_nothing_that_the_bucket_has(tmp_path, toolchain, endpoint, monkeypatch):
    for name, value in told(endpoint).items():
        monkeypatch.setenv(name, value)
    settings = Settings(ccache="s3://objects/vllm")
    first, second = (built(small_checkout(tmp_path / name, settings)) for name in ("one", "other"))
    assert (first["objects"]["hits"], first["objects"]["shared"]) == (0, 0)
    assert second["sha256"] == first["sha256"]
    assert second["objects"]["misses"] == 0
    assert second["objects"]["hits"] == second["objects"]["shared"] > 0
