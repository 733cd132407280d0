"""The object cache with real ccache, compilers, redis-server and nginx, and with failing servers."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.checkouts import edited, small_checkout
from voltforge.compile import cache_stats, object_cache
from voltforge.compile.cache_stats import CacheStats
from voltforge.compile.object_cache import ObjectCache, ObjectServer
from voltforge.compile.scheduler import socket_address
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import files, records

SOURCES = 3
"""The sources of the small package: two CUDA files and one C file."""

# A build works without ccache and without a server, so a machine may lack them. CI installs all and skips no test here.
needs_ccache = pytest.mark.skipif(not shutil.which("ccache"), reason="there is no ccache (apt-get install ccache)")


def built(pipeline: Pipeline) -> dict:
    package = pipeline.package(pipeline.recipes["saxpy"])
    for kind in ("fetch", "tree", "environment", "build"):
        package.stages[kind].run()
    return records.encode(package.build.result(), pipeline.root)


def again(pipeline: Pipeline) -> Pipeline:
    """The same checkout with nothing but the cache."""
    for name in ("work", "wheels", "stages/build-saxpy.json"):
        files.remove(pipeline.scratch / name)
    return Pipeline.load(pipeline.root, pipeline.settings)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until_it_listens(port: int) -> None:
    for _ in range(500):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise AssertionError(f"nothing listens at {port}")


@contextlib.contextmanager
def redis(folder: Path, *words: str) -> Iterator[int]:
    """Start a real redis-server and return its port."""
    if not (program := shutil.which("redis-server")):  # only farms and shared caches need it; CI installs it
        pytest.skip("there is no redis-server (apt-get install redis-server)")
    port = free_port()
    child = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder), *words],
        stdout=subprocess.DEVNULL,
    )
    try:
        until_it_listens(port)
        yield port
    finally:
        child.kill()
        child.wait()


@contextlib.contextmanager
def webdav(folder: Path) -> Iterator[int]:
    """Start a real nginx that accepts PUT and return its port."""
    if not (program := shutil.which("nginx")):  # CI has it
        pytest.skip("there is no nginx (apt-get install nginx)")
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""  # the folder is root's own, then
    text = f"""
        {user} daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1; events {{}}
        http {{
          access_log off; client_body_temp_path {folder}/body; client_max_body_size 0; proxy_temp_path {folder}/p;
          fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
          server {{
            listen 127.0.0.1:{port}; root {folder}/www;
            location / {{ dav_methods PUT DELETE; create_full_put_path on; }}
          }}
        }}"""
    files.write(folder / "nginx.conf", text)
    (folder / "www").mkdir()
    child = subprocess.Popen([program, "-c", folder / "nginx.conf", "-e", folder / "error.log"])
    try:
        until_it_listens(port)
        yield port
    finally:
        child.terminate()
        child.wait()


@contextlib.contextmanager
def odd(behave: Callable[[socket.socket], object]) -> Iterator[int]:
    """Start a server that handles each connection as the test says and return its port."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen(64)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = door.accept()
                    threading.Thread(target=behave, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield door.getsockname()[1]


# --- real builds ---


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, toolchain: object) -> str:
    """The SHA-256 of the small package's wheel without any cache."""
    return built(small_checkout(tmp_path_factory.mktemp("plain") / "checkout", Settings(ccache="off")))["sha256"]


@needs_ccache
@pytest.mark.slow
def test_a_clean_tree_is_built_from_the_cache_with_the_same_bytes(saxpy, plain, capsys):
    first = built(saxpy)
    assert first["sha256"] == plain
    assert first["objects"]["hits"] == 0
    assert first["objects"]["misses"] == SOURCES
    capsys.readouterr()
    second = built(again(saxpy))
    assert second["sha256"] == plain
    assert second["objects"]["misses"] == 0
    assert second["objects"]["hits"] == first["objects"]["misses"]
    assert second["objects"]["saved"] > 0
    assert f"objects from the cache: {second['objects']['hits']} of {second['objects']['hits']}, " in (
        capsys.readouterr().out
    )


@needs_ccache
@pytest.mark.slow
def test_only_a_changed_source_is_compiled(saxpy):
    built(saxpy)
    changed = built(again(edited(saxpy, "csrc/scale.cu", "x[i] *= a", "x[i] = a * x[i]")))["objects"]
    assert (changed["hits"], changed["misses"]) == (SOURCES - 1, 1)


@needs_ccache
@pytest.mark.slow
@pytest.mark.parametrize("serve", [redis, webdav], ids=["redis", "WebDAV"])
def test_a_second_checkout_compiles_nothing_that_the_server_has(tmp_path, toolchain, plain, serve):
    (tmp_path / "server").mkdir()
    with serve(tmp_path / "server") as port:
        scheme = "redis" if serve is redis else "http"
        address = f"{scheme}://127.0.0.1:{port}{'' if serve is redis else '/objects'}"
        one, other = (small_checkout(tmp_path / name, Settings(ccache=address)) for name in ("one", "other"))
        assert built(one)["objects"]["shared"] == 0
        found = built(other)
    assert found["sha256"] == plain
    assert found["objects"]["misses"] == 0
    assert found["objects"]["hits"] == found["objects"]["shared"] > 0


def silent(connection: socket.socket) -> None:
    time.sleep(60)
    connection.close()


def garbage(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while connection.recv(4096):
            connection.sendall(os.urandom(400))


@needs_ccache
@pytest.mark.slow
@pytest.mark.parametrize("behave", [silent, garbage, socket.socket.close], ids=["slow", "garbage", "hangs up"])
def test_a_failing_server_does_not_change_the_wheel(tmp_path, toolchain, plain, behave, capsys, monkeypatch):
    monkeypatch.setattr(object_cache, "TIMEOUT", 1.0)
    with odd(behave) as port:
        pipeline = small_checkout(tmp_path / "checkout", Settings(ccache=f"redis://127.0.0.1:{port}"))
        result = built(pipeline)
    assert result["sha256"] == plain
    assert result["objects"]["shared"] == 0
    told = f"! redis://127.0.0.1:{port} did not answer 3 times in a row and is not used again in this run\n"
    assert (told in capsys.readouterr().out) == (behave is not garbage)


@needs_ccache
@pytest.mark.slow
def test_a_full_server_or_broken_objects_do_not_change_the_wheel(tmp_path, toolchain, plain):
    with redis(tmp_path, "--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as port:
        full = built(small_checkout(tmp_path / "full", Settings(ccache=f"redis://127.0.0.1:{port}")))
    assert (full["sha256"], full["objects"]["shared"]) == (plain, 0)
    with redis(tmp_path) as port:
        cli = ["redis-cli", "-p", str(port)]
        settings = Settings(ccache=f"redis://127.0.0.1:{port}")
        built(small_checkout(tmp_path / "one", settings))
        keys = subprocess.run([*cli, "keys", "*"], capture_output=True, text=True, check=True).stdout.split()
        assert keys
        for key in keys:
            subprocess.run([*cli, "setrange", key, "60", "broken"], check=True, stdout=subprocess.DEVNULL)
        assert built(small_checkout(tmp_path / "other", settings))["sha256"] == plain


def test_a_compiler_may_take_longer_than_the_server_timeout(tmp_path, monkeypatch):
    monkeypatch.setattr(object_cache, "TIMEOUT", 0.3)
    with redis(tmp_path) as port, socket.socket(socket.AF_UNIX) as asks:
        ObjectCache(Path("/usr/bin/ccache"), tmp_path, ObjectServer.parse(f"redis://127.0.0.1:{port}")).forward(
            tmp_path
        )
        with socket_address(tmp_path, object_cache.SOCKET) as address:
            asks.connect(address)
        for _ in range(2):
            asks.sendall(b"PING\r\n")
            assert asks.recv(100) == b"+PONG\r\n"
            time.sleep(1)


def test_an_unreachable_server_is_reported_and_the_local_cache_is_used(tmp_path, capsys):
    port = free_port()
    made = ObjectCache(Path("/usr/bin/ccache"), tmp_path, ObjectServer.parse(f"redis://:secret@127.0.0.1:{port}"))
    assert not made.reachable()
    assert capsys.readouterr().out == (
        f"! redis://***@127.0.0.1:{port} cannot be reached (Connection refused): only the cache on this disk is used\n"
    )


# --- choosing a cache ---


def test_a_server_without_ccache_is_reported_and_everything_is_compiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert object_cache.open_cache("", tmp_path) is None
    assert not capsys.readouterr().out
    assert object_cache.open_cache("redis://127.0.0.1:1", tmp_path) is None
    assert "ccache is not installed; ./doit doctor prints how to install it" in capsys.readouterr().out


def test_an_unwritable_cache_folder_is_reported_and_everything_is_compiled(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert object_cache.open_cache("", tmp_path / "file" / "cache") is None
    assert f"! {tmp_path}/file/cache cannot be written (" in capsys.readouterr().out


def test_an_invalid_host_name_is_reported(tmp_path, capsys):
    assert not ObjectCache(Path("/usr/bin/ccache"), tmp_path, ObjectServer.parse("redis://cache..lan")).reachable()
    assert "cannot be reached" in capsys.readouterr().out


def test_a_ccache_without_remote_storage_is_reported(tmp_path, monkeypatch, capsys):
    files.write(tmp_path / "ccache", "#!/bin/sh\necho ccache version 4.5.1\n")
    (tmp_path / "ccache").chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(tmp_path / "ccache"))
    monkeypatch.setattr(object_cache, "SYSTEM", (str(tmp_path),))
    made = object_cache.open_cache("redis://127.0.0.1:1", tmp_path / "cache")
    assert made
    assert made.server is None
    assert capsys.readouterr().out == "! redis://127.0.0.1:1 is not used: ccache 4.5 is older than 4.7\n"


def test_the_cache_can_be_switched_off(tmp_path):
    assert object_cache.open_cache("off", tmp_path) is None


@pytest.mark.parametrize(
    "address",
    ["s3://", "ftp://a", "redis://", "localhost:6379", "on", "redis://a:port", "http://a/ b", "redis://a|read-only", "http://[::1"],
)  # fmt: skip
def test_an_unsupported_address_fails_with_a_sentence(address, tmp_path):
    with pytest.raises(VoltforgeError, match="is not the address of an object cache") as caught:
        object_cache.open_cache(address, tmp_path)
    assert "ccache=redis://host:6379" in caught.value.hint


@given(st.text())
def test_any_address_is_parsed_or_refused_with_a_sentence(address):
    with contextlib.suppress(VoltforgeError):
        assert ObjectServer.parse(address).port > 0


def test_user_and_folder_of_a_server_survive_the_tunnel():
    assert {ObjectServer.parse(f"redis://{user}secret@cache").address for user in ("", ":", "default:")} == {
        "redis://default:secret@cache"  # as ccache and redis both understand it
    }
    one = ObjectServer.parse("redis://me:secret@cache.example")
    assert (one.host, one.port) == ("cache.example", 6379)
    assert one.remote_storage("127.0.0.1", 4226) == "redis://me:secret@127.0.0.1:4226"
    assert ObjectServer.parse("http://a:8080/x/y").remote_storage("127.0.0.1", 4226) == "http://127.0.0.1:4226/x/y"
    assert "secret" not in str(one)


# --- changes that ccache does not see ---


@needs_ccache
def test_a_new_header_changes_the_key_of_objects(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.cpp").write_text('#if __has_include("b.h")\n#include "b.h"\n#else\nint a = 1;\n#endif\n')
    cache = ObjectCache(Path(shutil.which("ccache")), tmp_path / "cache")

    def compiled() -> bytes:
        told = cache.variables("a", object_cache.header_names_digest([tmp_path / "src"]), cache.folder, "")
        words = [cache.program, "g++", "-MD", "-MF", "a.d", "-c", "a.cpp", "-o", "a.o"]
        subprocess.run(words, cwd=tmp_path / "src", env={**os.environ, **told}, check=True)
        return (tmp_path / "src" / "a.o").read_bytes()

    before = compiled()
    assert compiled() == before
    (tmp_path / "src" / "b.h").write_text("int a = 2;\n")
    assert compiled() != before
    assert cache_stats.read(cache.log("a"), None) == CacheStats(hits=1, misses=2)


@needs_ccache
def test_a_new_hard_link_to_a_header_recompiles_nothing(tmp_path):
    """Without a sandbox, folders are copied by links, and uv's environments consist of links."""
    (tmp_path / "a.h").write_text("int a = 1;\n")
    (tmp_path / "a.cpp").write_text('#include "a.h"\n')
    cache = ObjectCache(Path(shutil.which("ccache")), tmp_path / "cache")
    os.utime(tmp_path / "a.h", (10**9, 10**9))
    for number in range(2):
        os.link(tmp_path / "a.h", tmp_path / f"link-{number}")
        words = [cache.program, "g++", "-MD", "-MF", "a.d", "-c", "a.cpp", "-o", "a.o"]
        told = cache.variables("a", "", cache.folder, "")
        subprocess.run(words, cwd=tmp_path, env={**os.environ, **told}, check=True)
    assert cache_stats.read(cache.log("a"), None) == CacheStats(hits=1, misses=1)


def test_header_names_and_cmake_files_count_and_sources_do_not(tmp_path):
    for name in ("one", "other"):
        files.write(tmp_path / name / "a.h", "1")
        files.write(tmp_path / name / "CMakeLists.txt", "1")
    before = object_cache.header_names_digest([tmp_path / "one"])
    assert object_cache.header_names_digest([tmp_path / "other"]) == before, "where it lies does not count"
    for path, content, counts in (
        ("a.h", "2", False), ("b.cu", "1", False), ("c/b.cuh", "1", True), ("CMakeLists.txt", "2", True),
        ("version.h.in", "1", True), ("vector", "1", True),
    ):  # fmt: skip
        last = object_cache.header_names_digest([tmp_path / "one"])
        files.write(tmp_path / "one" / path, content)
        assert (object_cache.header_names_digest([tmp_path / "one"]) != last) == counts, path


@needs_ccache
@pytest.mark.slow
def test_a_new_header_recompiles_everything(saxpy):
    built(saxpy)
    first = edited(saxpy, "csrc/scale.cu", "x[i] *= a", "x[i] = a * x[i]")
    (first.root / "saxpy" / "csrc" / "new.h").write_text("")
    assert built(again(edited(first, "csrc/scale.cu", "a * x[i]", "x[i] * a")))["objects"]["hits"] == 0


def test_the_cache_on_this_disk_is_the_default(saxpy):
    if not shutil.which("ccache"):
        assert saxpy.objects is None
        return
    assert saxpy.objects
    assert saxpy.objects.folder == saxpy.scratch / "cache" / "ccache"
    assert replace(saxpy, settings=Settings(ccache="off")).objects is None
