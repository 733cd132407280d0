"""A second build under other conditions has the same bytes; a difference is reported, kept, and a failure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.checkouts import ROOT, edited, small_checkout
from tests.support.samples import compiled, wheel
from tests.support.tally import Tally
from voltforge.commands import reproduce
from voltforge.commands.build_conditions import Variation
from voltforge.commands.reproduce import NotReproducible, SecondCheckout, prepare
from voltforge.compile.toolchain import Toolchain
from voltforge.errors import VoltforgeError
from voltforge.gpu import triton_kernels
from voltforge.image import container_engine
from voltforge.image.layers import LAYERS
from voltforge.image.stages import RuntimeImage
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import environment, index
from voltforge.system import files

KINDS = ("fetch", "tree", "environment", "build", "check", "wheels")
FIRST = 1_700_000_000.0
"""When something was built, as far as these tests say."""

PROBE = """
import json, os, time, voltforge
from pathlib import Path
from voltforge.sources.fetch import Artifact, Store
from voltforge.sources.index import configured
umask = os.umask(0)
got = Store.from_environment(Path("here")).get(Artifact("saxpy-1.0.tar.gz", {sha256!r}))
print(json.dumps({{
    "code": voltforge.__file__, "umask": f"{{umask:04o}}", "user": [os.getuid(), os.getgid()], "zone": time.timezone,
    "got": str(got), "index": str(configured()), "environ": dict(os.environ),
}}))
"""


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second build asks another machine: what it lacks is in this checkout's downloads and in uv's cache."""
    monkeypatch.setenv("VOLTFORGE_MIRRORS", str(ROOT / "build" / "downloads"))
    monkeypatch.setenv("VOLTFORGE_OFFLINE", "1")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, toolchain: Toolchain) -> Pipeline:
    """A checkout whose wheelhouse has saxpy."""
    return built(small_checkout(tmp_path_factory.mktemp("kept") / "checkout"))


def built(pipeline: Pipeline) -> Pipeline:
    for kind in KINDS:
        pipeline.package(pipeline.recipes["saxpy"]).stages[kind].run()
    return pipeline


def seen(pipeline: Pipeline, second: SecondCheckout) -> dict:
    """Return the environment of a program that runs under the conditions of the second build."""
    log = pipeline.scratch / "logs" / "probe.log"
    probe = PROBE.format(sha256=pipeline.recipes["saxpy"].source.sha256)
    second.run([sys.executable, "-c", probe], log, "probe")
    return json.loads(log.read_text().splitlines()[-1])


def by_name(second: SecondCheckout) -> dict[str, Variation]:
    return {variation.what: variation for variation in second.variations}


# --- the conditions ---


def test_a_second_build_has_another_user_umask_zone_home_language_and_hash_seed(saxpy: Pipeline, near: None) -> None:
    second = prepare(saxpy, "saxpy", made=FIRST, jobs=2)
    told, really = by_name(second), seen(saxpy, second)
    assert really["code"] == str(second.root / "voltforge" / "__init__.py")
    assert really["umask"] == told["umask"].second != told["umask"].first
    assert really["zone"] == -20700
    assert not told["user"].same_because, "this machine can make user namespaces: sandboxes are tested on it"
    assert really["user"] == [int(told["user"].second)] * 2 != [os.getuid(), os.getgid()]
    for what, variable in (("home", "HOME"), ("locale", "LC_ALL"), ("hash seed", "PYTHONHASHSEED")):
        assert really["environ"][variable] == told[what].second != told[what].first
    assert told["length of the path"].first != told["length of the path"].second == str(len(str(second.root)))
    assert told["time"].first < told["time"].second
    assert (told["jobs"].first, told["jobs"].second, second.jobs) == ("2", "1", "1")


def test_conditions_of_the_first_build_are_inverted(saxpy: Pipeline, monkeypatch) -> None:
    for key, value in (("TZ", "NPT-5:45"), ("PYTHONHASHSEED", "4242"), ("LC_ALL", "tr_TR.UTF-8"), ("LANG", "C")):
        monkeypatch.setenv(key, value)
    before = os.umask(0o077)
    try:
        second = prepare(saxpy, "saxpy", made=FIRST, jobs=1)
    finally:
        os.umask(before)
    told = by_name(second)
    assert [told[what].second for what in ("umask", "time zone", "hash seed", "jobs")] == ["0022", "CST+6", "2424", "2"]
    assert told["locale"].second == "C"
    assert "umask 0022" in " ".join(second.prefix)


def test_downloads_are_reused_but_not_the_shared_cache_and_the_key(
    tmp_path: Path, toolchain: Toolchain, monkeypatch
) -> None:
    monkeypatch.setenv("VOLTFORGE_OFFLINE", "1")
    monkeypatch.setenv("VOLTFORGE_CACHE", "http://127.0.0.1:9/cache")
    monkeypatch.setenv("VOLTFORGE_KEY", "/my/key.pem")
    monkeypatch.setenv("VOLTFORGE_MIRRORS", "/an/other, /and/one")
    pipeline = small_checkout(tmp_path / "a checkout, with a comma")
    really = seen(pipeline, second := prepare(pipeline, "saxpy", made=FIRST))
    assert Path(really["got"]).name == "saxpy-1.0.tar.gz"
    assert not {"VOLTFORGE_CACHE", "VOLTFORGE_KEY"} & set(really["environ"])
    assert really["environ"]["VOLTFORGE_MIRRORS"].endswith(" /an/other, /and/one")
    assert [path.name for path in (second.root / "build").glob("*")] == []


def test_another_home_keeps_index_credentials_and_uv_cache(
    saxpy: Pipeline, tmp_path: Path, near: None, monkeypatch
) -> None:
    home = tmp_path / "home"
    (home / ".config" / "pip").mkdir(parents=True)
    (home / ".config" / "pip" / "pip.conf").write_text(
        "[global]\nindex-url = http://me:word@127.0.0.1:9/simple\nextra-index-url = http://127.0.0.1:9/one\n"
    )
    (home / ".netrc").touch()
    for variable in [name for name in os.environ if name.startswith(("PIP_", "UV_", "XDG_", "NETRC"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(home))
    ours = index.configured()
    assert ours.default == "http://me:word@127.0.0.1:9/simple"
    second = prepare(saxpy, "saxpy", made=FIRST)
    really = seen(saxpy, second)
    named = replace(ours, certificate_from="PIP_CERT" if ours.certificate else "")
    assert really["index"] == str(named)
    assert really["environ"]["UV_CACHE_DIR"] == str(home / ".cache" / "uv")
    assert really["environ"]["NETRC"] == str(home / ".netrc")
    assert "word" not in " ".join(second.prefix) + (saxpy.scratch / "logs" / "probe.log").read_text().splitlines()[0]


def test_an_unchanged_user_is_reported(saxpy: Pipeline, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    second = prepare(saxpy, "saxpy", made=FIRST)
    assert by_name(second)["user"].same_because == "unshare(1) cannot map another user on this machine"
    assert "unshare" not in second.prefix
    same = [variation.what for variation in second.variations if variation.same_because]
    assert second.varied == len(second.variations) - len(same)
    assert {"user", "jobs"} <= set(same)


def test_directory_order_is_varied_where_the_file_system_allows(kept: Pipeline) -> None:
    """On tmpfs names are listed as they came."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):  # containers can lack /dev/shm; no other file system has this order. CI has it
        pytest.skip("this machine has no writable /dev/shm")
    root = memory / f"voltforge-{os.getpid()}"
    try:
        for path in sorted(path for path in (kept.root / "recipes").rglob("*") if path.is_file()):
            target = root / path.relative_to(kept.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        order = by_name(prepare(Pipeline.load(root, Settings()), "saxpy", made=FIRST))["order of names"]
    finally:
        files.remove(root)
    assert not order.same_because
    assert order.first != order.second


def test_leftovers_of_an_interrupted_run_are_removed(saxpy: Pipeline) -> None:
    left = saxpy.scratch / "reproduce" / "saxpy" / "half" / "done"
    left.mkdir(parents=True)
    (left / "file").touch()
    left.chmod(0o500)
    second = prepare(saxpy, "saxpy", made=FIRST)
    assert [path.name for path in second.root.parent.iterdir()] == [reproduce.ELSEWHERE]
    assert (second.root / "dodo.py").read_bytes() == (ROOT / "dodo.py").read_bytes()
    assert (second.root / "recipes" / "saxpy.toml").is_file()


# --- twice ---


@pytest.mark.slow
def test_a_reproducible_package_is_identical_and_the_second_build_is_removed(
    kept: Pipeline, near: None, counted: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = reproduce.wheel(kept, "saxpy")
    assert compared.tier == "identical"
    assert not (kept.scratch / "reproduce" / "saxpy").exists()
    record = json.loads((kept.scratch / "reproduce" / "saxpy.json").read_text())
    receipt = files.read_json(kept.wheelhouse.receipt("saxpy", environment.python_tag()))
    assert record["sha256"] == [receipt["results"]["sha256"]] * 2
    said = capsys.readouterr().out
    assert "the same, bit for bit" in said
    assert "time zone" in said
    varied = [variation["what"] for variation in record["variations"] if not variation["same_because"]]
    assert {"user", "umask", "locale", "time zone", "home", "hash seed", "jobs", "length of the path"} <= set(varied)
    counted("variations under which the hashes agreed", len(varied))
    log = (kept.scratch / "logs" / "reproduce-saxpy.log").read_text()
    assert "objects from the cache" not in log, "the second build must be a build"
    assert "* build saxpy 1.0" in log, "a second build must be a build"
    assert f"at most {record['variations'][-2]['second']} jobs" in log


NOISE = (
    (
        "CMakeLists.txt",
        "install(",
        """file(READ /proc/sys/kernel/random/uuid noise)
string(STRIP "${noise}" noise)
target_compile_definitions(_C PRIVATE "$<$<COMPILE_LANGUAGE:C>:NOISE=\\"${noise}\\">")
install(""",
    ),
    (
        "csrc/module.c",
        "static PyObject *where",
        """const char saxpy_noise[] = "made as " NOISE;
static PyObject *where""",
    ),
    (
        "setup.py",
        "ROOT = Path(__file__).parent\n",
        """ROOT = Path(__file__).parent
(ROOT / "saxpy" / "made.py").write_text(f"one = 1\\nnoise = {os.urandom(8).hex()!r}\\n")
""",
    ),
)
"""Changes that differ in each build: a definition for C, and a module."""


@pytest.mark.slow
def test_a_difference_is_reported_with_section_symbol_and_line(saxpy: Pipeline, near: None) -> None:
    pipeline = saxpy
    for change in NOISE:
        pipeline = edited(pipeline, *change)
    with pytest.raises(NotReproducible) as caught:
        reproduce.wheel(built(pipeline), "saxpy")
    assert caught.value.exit_status == 4
    assert caught.value.comparison.tier == "different"
    for words in ("saxpy/_C.abi3.so .rodata saxpy_noise", "saxpy/made.py line 2", "not the same"):
        assert words in caught.value.what
    binary, text = caught.value.comparison.differences
    assert 'in "made as ' in binary.one
    assert text.one.startswith("noise = ")
    assert text.one != text.other
    second = pipeline.scratch / "reproduce" / "saxpy" / reproduce.ELSEWHERE
    assert str(second) in caught.value.hint
    assert next((second / "wheelhouse").glob("saxpy-*.whl"))


@pytest.mark.slow
def test_a_failed_second_build_names_its_log(kept: Pipeline, monkeypatch) -> None:
    monkeypatch.setenv("VOLTFORGE_OFFLINE", "1")
    monkeypatch.delenv("VOLTFORGE_MIRRORS", raising=False)
    downloads = kept.scratch / "downloads"
    downloads.rename(kept.scratch / "elsewhere")
    try:
        with pytest.raises(VoltforgeError, match="the second build of saxpy failed: ") as caught:
            reproduce.wheel(kept, "saxpy")
    finally:
        (kept.scratch / "elsewhere").rename(downloads)
    assert not isinstance(caught.value, NotReproducible)
    log = kept.scratch / "logs" / "reproduce-saxpy.log"
    assert str(log) in caught.value.hint
    assert "saxpy-1.0.tar.gz" in log.read_text()


def test_a_missing_first_build_is_reported(saxpy: Pipeline) -> None:
    with pytest.raises(VoltforgeError, match="the wheelhouse has no saxpy for cp3") as caught:
        reproduce.wheel(saxpy, "saxpy")
    assert caught.value.hint == "./doit wheels:saxpy"


# --- the image ---

WARM = """\
# In place of vLLM's kernels, which are no part of these wheels: one file, where the real command puts its own.
import sys
from pathlib import Path

cache = Path(sys.argv[sys.argv.index("--cache") + 1])
cache.mkdir(parents=True)
(cache / "kernel.cubin").write_text(sys.argv[sys.argv.index("--at") + 1])
print("1 kernel")
"""
DOCKERFILE = "ARG BASE\nFROM ${BASE}\n" + "".join(f"COPY --chmod=755 {layer}/ /\n" for layer in LAYERS[-4:])


@pytest.fixture
def images(tmp_path: Path, toolchain: Toolchain, near: None, monkeypatch) -> Iterator[RuntimeImage]:
    """A checkout whose image is of two small wheels on nothing, with a store of its own for the engine."""
    settings = tmp_path / "storage.conf"
    places = f'graphroot = "{tmp_path}/containers"\nrunroot = "{tmp_path}/state"\n'
    settings.write_text(f'[storage]\ndriver = "vfs"\n{places}')
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(settings))
    pipeline = small_checkout(tmp_path / "checkout", Settings(base="scratch"))
    docker = pipeline.root / "docker"
    files.write(docker / "Dockerfile", DOCKERFILE)
    files.write(docker / "leave-out.toml", "")
    files.write(docker / "start.py", "")
    for name in triton_kernels.PRECOMPILE:
        files.write(pipeline.root / "volta" / name, WARM if name == "triton_kernels/precompile.py" else "")
    files.write(pipeline.root / "recipes" / "locks" / "vllm-runtime.txt", "")
    library = compiled(tmp_path / "library.so", "int one(void) { return 1; }")
    for name, needs in (("torch", ""), ("vllm", "Requires-Dist: torch\n")):
        content = {f"{name}/__init__.py": "", f"{name}/library.so": library}
        pipeline.wheelhouse.add(wheel(tmp_path / name, content, name=name, metadata=needs))
    yield RuntimeImage(pipeline)
    # Only the engine can remove the layers of an ordinary user.
    subprocess.run([container_engine.choose().kind, "rmi", "--all", "--force"], capture_output=True, check=False)


@pytest.mark.slow
def test_equal_wheels_give_equal_image_archives(images: RuntimeImage, counted: Tally) -> None:
    try:
        images.image.run()
    except VoltforgeError as error:  # engines must mount, which many containers forbid; CI's machine allows it
        pytest.skip(f"no engine can build an image on this machine: {error.what}")
    pipeline = images.pipeline
    compared = reproduce.image(pipeline, images)
    assert compared.tier == "identical"
    record = json.loads((pipeline.scratch / "reproduce" / "image.json").read_text())
    told = {variation["what"]: variation["same_because"] for variation in record["variations"]}
    assert told["user"] == "the engine uses its own user namespace"
    assert not told["umask"]
    counted("variations under which the hashes agreed", sum(not why for why in told.values()))
    assert not (pipeline.scratch / "reproduce" / "image").exists()
    assert "* image localhost/voltforge:1.0-sm70" in (pipeline.scratch / "logs" / "reproduce-image.log").read_text()
