"""vLLM's Triton kernels on 7.0: they compile, within a Volta's limits, and a cache made ahead of time is found.

Everything runs beside vLLM, in an environment with the kept wheel, through the programs that a person would run. No GPU
is here: the driver is a pretended one that says 7.0, and nothing is launched.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkouts import ROOT
from volta import tables
from voltforge import files, kernels
from voltforge.checkout import Settings
from voltforge.environment import Environment
from voltforge.kernels import KernelError
from voltforge.pipeline import Pipeline
from voltforge.process import run


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(ROOT, Settings())


@pytest.fixture(scope="module")
def settled(pipeline: Pipeline) -> Iterator[Environment]:
    """Where the kept wheel is installed; it is built if it is not the series' own."""
    done = subprocess.run(["./doit", "wheels:vllm"], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    with kernels.installed(pipeline) as environment:
        yield environment


def python(pipeline: Pipeline, settled: Environment, text: str, tmp_path: Path) -> Any:
    """What a program prints, as JSON, run beside vLLM."""
    (tmp_path / "program.py").write_text(text)
    return json.loads(kernels.asked(pipeline, settled, tmp_path / "program.py").strip().splitlines()[-1])


def row(**fields: Any) -> dict[str, Any]:
    plain = {"case": "one", "kernel": "two", "problem": "", "waits_for": "", "seconds": 1.0, "instructions": {}}
    return {**plain, **fields}


# What a person is told.


def test_a_kernel_that_does_not_compile_is_named_with_the_compilers_own_line() -> None:
    with pytest.raises(KernelError, match=r"two does not compile for 7\.0: at 3:4"):
        kernels.report([row(problem="one: two does not compile for 7.0: at 3:4 of the kernel: no")], set())


def test_a_case_may_wait_for_a_patch_only_while_that_is_not_in_the_series() -> None:
    waiting = [row(problem="no", waits_for="0099-later")]
    kernels.report(waiting, {"0001-first"})
    with pytest.raises(KernelError):
        kernels.report(waiting, {"0001-first", "0099-later"})


def test_the_wheelhouse_must_have_a_wheel(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    with (
        pytest.raises(Exception, match="the wheelhouse has no vllm"),
        kernels.installed(Pipeline.load(tmp_path, Settings())),
    ):
        pass


# What is compiled.


@pytest.mark.build
def test_attention_of_every_head_size_keeps_within_registers_and_48_kib(
    pipeline: Pipeline, settled: Environment
) -> None:
    rows = kernels.compiled(pipeline, settled, "--tiles")
    assert {one["case"].split("head_size=")[1].split()[0] for one in rows} == {"64", "80", "96", "128", "256"}
    for one in rows:
        assert one["after"]["spill"] <= 8, one
        assert one["after"]["shared"] <= 48 << 10, one
        assert one["after"]["instructions"]["HMMA"] == 0
    spilled = [one["before"]["spill"] for one in rows]
    assert max(spilled) > 8000
    assert sum(spill > 500 for spill in spilled) >= 4


@pytest.mark.build
def test_the_table_of_the_documentation_is_what_the_compiler_says(pipeline: Pipeline, settled: Environment) -> None:
    written = (ROOT / "docs" / "kernels.md").read_text()
    for only in ("awq", "mrope", "reshape-and-cache"):
        rows = kernels.compiled(pipeline, settled, "--only", only)
        table = tables.markdown(tables.HEADINGS, tables.summary(rows)).splitlines()[2:]
        assert table
        assert all(line in written for line in table), only


SAME_KEYS = """
import json, sys
from volta import pretend
pretend.capability((8, 0))
from vllm.attention.ops import triton_unified_attention as ours
from volta.cases import Attention, Tensors
import pathlib, importlib.util
stock = pathlib.Path(sys.argv[0]).with_name("stock.py")
keys = {}
for name, source in {"ours": pathlib.Path(ours.__file__), "stock": stock}.items():
    spec = importlib.util.spec_from_file_location(ours.__name__, source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    keys[name] = []
    for size, heads, query in ((64, 8, 16), (256, 8, 16), (128, 48, 1)):
        case = Attention(dtype="fp16", head_size=size, heads=heads, kv_heads=1, query=query)
        with pretend.launches() as seen:
            module.unified_attention(**case.tensors(Tensors()))
        keys[name] += [launch.kernel.hash for launch in seen]
print(json.dumps(keys))
"""


@pytest.mark.build
def test_other_capabilities_launch_the_very_same_kernels_with_the_patch(
    pipeline: Pipeline, settled: Environment, tmp_path: Path
) -> None:
    name = "vllm/attention/ops/triton_unified_attention.py"
    patched = settled.site_packages / name
    unpatch(pipeline, patched, tmp_path / "stock.py")
    assert files.sha256(patched) != files.sha256(tmp_path / "stock.py")
    keys = python(pipeline, settled, SAME_KEYS, tmp_path)
    assert keys["ours"] == keys["stock"]
    assert len(keys["ours"]) == 4


def unpatch(pipeline: Pipeline, patched: Path, target: Path) -> None:
    """The file without patch 0015."""
    patch = pipeline.root / "patches" / "vllm" / "0015-attention-tiles.patch"
    target.write_bytes(patched.read_bytes())
    run(["patch", "--reverse", "--fuzz=0", "--posix", target, patch])


# What is made ahead of time.

CONFIG = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 1024, "head_dim": 128}


@pytest.fixture(scope="module")
def cache(pipeline: Pipeline, settled: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for one small model, which will lie at /nowhere."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    warmed(pipeline, settled, folder, "--at", "/nowhere")
    return folder


def warmed(pipeline: Pipeline, settled: Environment, folder: Path, *words: str) -> str:
    return kernels.asked(
        pipeline, settled, "-m", "volta.warm", "--cache", folder / "cache", "--model", folder / "config.json",
        "--tensor-parallel", "1", *words,
    )  # fmt: skip


@pytest.mark.build
def test_a_later_process_finds_all_kernels_and_launchers_and_compiles_nothing(
    pipeline: Pipeline, settled: Environment, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = started()
    monkeypatch.setattr(start, "HERE", tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "triton-cache").symlink_to(cache / "cache")
    start.bring_cache()
    said = warmed(pipeline, settled, tmp_path, "--check")
    assert re.search(r"\d+ kernels, all in the cache", said)
    next((tmp_path / "cache").glob("*/kernel_unified_attention_2d.cubin")).parent.rename(tmp_path / "gone")
    with pytest.raises(KernelError, match="kernel_unified_attention_2d: it is not in the cache"):
        warmed(pipeline, settled, tmp_path, "--check")


def started() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("start", ROOT / "docker" / "start.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.build
def test_the_cache_says_nothing_of_the_machine_that_made_it(
    pipeline: Pipeline, settled: Environment, cache: Path, tmp_path: Path
) -> None:
    for path in (cache / "cache").rglob("*"):
        if path.is_file():
            assert str(settled.path).encode() not in path.read_bytes(), path
            assert str(cache).encode() not in path.read_bytes(), path
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    warmed(pipeline, settled, tmp_path, "--at", "/nowhere")
    assert content(tmp_path / "cache") == content(cache / "cache")


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.build
def test_a_model_that_is_no_transformer_is_refused_in_words(
    pipeline: Pipeline, settled: Environment, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(KernelError, match="--model has no 'num_attention_heads'"):
        warmed(pipeline, settled, tmp_path)
