"""Every byte that can change a wheel changes its key; other edits do not."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.checkouts import SAXPY, small_checkout
from tests.support.tally import Tally
from voltforge.compile.toolchain import COMPILERS, Toolchain
from voltforge.errors import VoltforgeError
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import environment

PATCH = """\
From: a founder
Subject: say more

---
--- a/saxpy/__init__.py
+++ b/saxpy/__init__.py
@@ -1 +1,2 @@
 \"\"\"A small CUDA extension.\"\"\"
+# patched
"""
often = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, toolchain: Toolchain) -> Pipeline:
    """A small checkout with a patch and an unpacked source."""
    pipeline = small_checkout(tmp_path_factory.mktemp("keys") / "checkout")
    series = pipeline.root / "patches" / "saxpy"
    series.mkdir(parents=True)
    (series / "0001-say-more.patch").write_text(PATCH)
    for kind in ("fetch", "tree"):
        pipeline.package(pipeline.recipes["saxpy"]).stages[kind].run()
    return pipeline


def keys(pipeline: Pipeline) -> tuple[str, str]:
    """Return the current keys of the built wheel and of the checked wheel."""
    again = Pipeline.load(pipeline.root, pipeline.settings)
    package = again.package(again.recipes["saxpy"])
    return package.stages["build"].key(), package.stages["wheels"].key()


@contextlib.contextmanager
def holding(path: Path, content: bytes) -> Iterator[None]:
    """Give a file other content while the block runs."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(data: bytes, at: int, bits: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


def recipe(pipeline: Pipeline) -> Path:
    return pipeline.root / "recipes" / "saxpy.toml"


@pytest.mark.parametrize("file", ["patches/saxpy/0001-say-more.patch", "recipes/locks/saxpy.txt"])
@often
@given(at=st.integers(0, 100_000), bits=st.integers(1, 255))
def test_any_byte_of_a_patch_or_lock_changes_the_key(
    grown: Pipeline, counted: Tally, file: str, at: int, bits: int
) -> None:
    before, path = keys(grown), grown.root / file
    with holding(path, flipped(path.read_bytes(), at, bits)):
        with contextlib.suppress(VoltforgeError):  # a patch needs a subject and a diff
            assert not {*keys(grown)} & {*before}
            counted("changes of one byte that changed the key")
    assert keys(grown) == before


@often
@given(
    lines=st.lists(
        st.tuples(
            st.integers(0, 30),
            st.sampled_from(["", "# a comment", "#", "   # [build]"]) | st.text("# ab\t", max_size=9),
        ),
        min_size=1,
    )
)
def test_comments_and_blank_lines_of_a_recipe_do_not_change_the_key(
    grown: Pipeline, counted: Tally, lines: list[tuple[int, str]]
) -> None:
    before, text = keys(grown), recipe(grown).read_text().splitlines()
    for at, line in lines:
        text.insert(at % (len(text) + 1), line if line.strip() == "" else f"#{line}")
    with holding(recipe(grown), "\n".join(text).encode()):
        assert keys(grown) == before
    counted("edits without effect that did not change the key")


OPTIONS = {
    'arch = ["7.0"]': 'arch = ["7.0", "8.0"]',
    'TORCH_CUDA_ARCH_LIST = "{arch}"': 'TORCH_CUDA_ARCH_LIST = "{arch}+PTX"',
    "[finish.runpath]": '[build.config_settings]\n"--quiet" = "1"\n\n[finish.runpath]',
    "$ORIGIN/../nvidia/cuda_runtime/lib": "$ORIGIN/../nvidia/cuda_runtime/lib64",
    "env = { ": 'env = { SAXPY = "1", ',
}


@pytest.mark.parametrize("old", OPTIONS)
def test_any_option_of_a_recipe_changes_the_key(grown: Pipeline, counted: Tally, old: str) -> None:
    before, text = keys(grown), recipe(grown).read_text()
    assert old in text
    with holding(recipe(grown), text.replace(old, OPTIONS[old]).encode()):
        assert not {*keys(grown)} & {*before}
    counted("changes of an option that changed the key")


def test_expectations_change_only_the_key_of_the_checked_wheel(grown: Pipeline) -> None:
    before, text = keys(grown), recipe(grown).read_text()
    with holding(recipe(grown), text.replace("100 kB", "90 kB").encode()):
        built, kept = keys(grown)
    assert built == before[0]
    assert kept != before[1]


def test_source_changes_the_key(grown: Pipeline) -> None:
    before, text = keys(grown), recipe(grown).read_text()
    sha256 = grown.recipes["saxpy"].source.sha256
    with holding(recipe(grown), text.replace(sha256, "0" * 64).encode()):
        assert not {*keys(grown)} & {*before}


@pytest.mark.parametrize("names", ["0001-say-mire.patch", "0002-say-more.patch"])
def test_name_and_order_of_patches_change_the_key(grown: Pipeline, names: str) -> None:
    before, path = keys(grown), grown.root / "patches" / "saxpy" / "0001-say-more.patch"
    path.rename(path.with_name(names))
    try:
        assert not {*keys(grown)} & {*before}
    finally:
        path.with_name(names).rename(path)


def test_python_version_changes_the_key(grown: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(grown)
    monkeypatch.setattr(environment, "interpreter", lambda: "cpython-3.11.99")
    assert not {*keys(grown)} & {*before}


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [name for name in COMPILERS if name != "bin/nvcc"])
def test_one_byte_of_a_compiler_changes_the_key(
    grown: Pipeline, toolchain: Toolchain, tmp_path: Path, monkeypatch, counted: Tally, compiler: str
) -> None:
    """The key with a toolkit that CUDA_HOME names; only its nvcc is run, for its version."""
    home = tmp_path / "cuda"
    shutil.copytree(toolchain.home, home, copy_function=os.link, symlinks=True)
    monkeypatch.setenv("CUDA_HOME", str(home))
    pipeline = Pipeline.load(grown.root, replace(grown.settings, cuda="system"))
    record = pipeline.toolchain.path.read_bytes()
    try:
        pipeline.toolchain.run()
        before = keys(pipeline)
        data = (home / compiler).read_bytes()
        (home / compiler).unlink()  # its other names keep the old content
        (home / compiler).write_bytes(flipped(data, len(data) // 2, 1))
        (home / compiler).chmod(0o755)
        assert not pipeline.toolchain.current()
        pipeline.toolchain.run()
        assert not {*keys(pipeline)} & {*before}
    finally:
        pipeline.toolchain.path.write_bytes(record)
    counted("changes of one byte that changed the key")


def test_inputs_that_cannot_change_a_wheel_do_not_change_its_key(
    grown: Pipeline, tmp_path: Path, monkeypatch, counted: Tally
) -> None:
    before = keys(grown)
    varied = [
        replace(grown.settings, jobs="7"),
        replace(grown.settings, sandbox="off"),
        replace(grown.settings, gc="x"),
    ]
    for choice in varied:
        assert keys(Pipeline.load(grown.root, choice)) == before
    for name, value in {"LANG": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu", "HOME": "/nowhere", "CFLAGS": "-O0"}.items():
        monkeypatch.setenv(name, value)
        assert keys(grown) == before
    for path in grown.root.rglob("*.t*"):
        if path.is_file() and not path.is_relative_to(grown.scratch):
            os.utime(path, (1, 1))
    assert keys(grown) == before
    shutil.copytree(grown.root, tmp_path / "a" / "longer name", symlinks=True)
    assert keys(Pipeline.load(tmp_path / "a" / "longer name", grown.settings)) == before
    counted("edits without effect that did not change the key", 9)


def test_recipe_of_these_tests_has_every_option() -> None:
    assert all(old.replace("{", "{{").replace("}", "}}") in SAXPY for old in OPTIONS)


def test_names_of_the_toolchain_are_hashed(toolchain: Toolchain) -> None:
    assert set(COMPILERS) < set(toolchain.identity)
    assert all(len(toolchain.identity[f"g++/{name}"]) == 64 for name in ("cc1plus", "as", "collect2", "ld"))
