"""The start script of the image: refusals in a sentence, signals passed on, and a message if the model is too large.

There is no GPU: NVIDIA's management library is a fake that answers as its binding does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.support.checkouts import ROOT

START = ROOT / "docker" / "start.py"


@pytest.fixture
def start() -> ModuleType:
    spec = importlib.util.spec_from_file_location("start", START)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NVMLError(Exception):
    pass


def nvml(driver: str | bytes = "550.54.15", cards: tuple[tuple[str, tuple[int, int]], ...] = (), broken: bool = False):
    def init() -> None:
        if broken:
            raise NVMLError

    return SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=init, nvmlShutdown=lambda: None, nvmlSystemGetDriverVersion=lambda: driver,
        nvmlDeviceGetCount=lambda: len(cards), nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetCudaComputeCapability=lambda card: cards[card][1], nvmlDeviceGetName=lambda card: cards[card][0],
    )  # fmt: skip


VOLTA = ("Tesla V100-PCIE-16GB", (7, 0))
AMPERE = ("NVIDIA A10", (8, 6))


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (nvml(broken=True), "this container has no NVIDIA driver"),
        (nvml("525.147.05", (VOLTA,)), "the NVIDIA driver is 525.147.05; this image needs 535 or newer"),
        (nvml(b"470.1", (VOLTA,)), "the NVIDIA driver is 470.1;"),
        (nvml(), "shows no GPU"),
        (nvml(cards=(VOLTA, AMPERE)), "GPU 1 (NVIDIA A10) has compute capability 8.6"),
    ],
)
def test_an_unsuitable_machine_is_refused_with_the_reason(start, monkeypatch, library, said) -> None:
    monkeypatch.setattr(start, "library", lambda: library)
    assert said in start.refusal({})


def test_volta_with_a_recent_driver_is_accepted_and_any_card_on_request(start, monkeypatch) -> None:
    monkeypatch.setattr(start, "library", lambda: nvml(cards=(VOLTA, VOLTA)))
    assert start.refusal({}) == ""
    monkeypatch.setattr(start, "library", lambda: nvml(cards=(AMPERE,)))
    assert start.refusal({"VOLTFORGE_ANY_GPU": "1"}) == ""


def program(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "server.py").write_text(text)
    return [sys.executable, str(tmp_path / "server.py")]


@pytest.mark.parametrize(
    "line",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "ValueError: To serve at least one request with the models's max seq len (4096), 2.00 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (1.00 GiB).",
    ],
)
def test_a_model_that_does_not_fit_is_reported_at_the_end(start, tmp_path, capfd, line) -> None:
    words = program(tmp_path, f"import sys; print({line!r}, file=sys.stderr); sys.exit(3)")
    assert start.serve(words) == 3
    said = capfd.readouterr().err.splitlines()
    assert said[0] == line
    assert said[-1].startswith("voltforge: the model does not fit into the GPU's memory (")


def test_other_failures_get_no_further_message(start, tmp_path, capfd) -> None:
    assert start.serve(program(tmp_path, "import sys; print('no such model', file=sys.stderr); sys.exit(1)")) == 1
    assert "voltforge" not in capfd.readouterr().err


SERVER = """
import signal, sys, time
def end(*_):
    print("ended well", file=sys.stderr, flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("serving", file=sys.stderr, flush=True)
time.sleep(60)
"""


def test_sigterm_is_passed_on_and_the_exit_status_returned(tmp_path) -> None:
    words = program(tmp_path, SERVER)
    driver = f"import sys; sys.path.insert(0, {str(START.parent)!r}); import start; sys.exit(start.serve({words!r}))"
    child = subprocess.Popen([sys.executable, "-c", driver], stderr=subprocess.PIPE, text=True)
    assert child.stderr
    assert child.stderr.readline() == "serving\n"
    begun = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == 0
    assert "ended well" in child.stderr.read()
    assert time.monotonic() - begun < 20


def test_precompiled_kernels_are_copied_to_tritons_cache(start, tmp_path, monkeypatch) -> None:
    (tmp_path / "triton-cache/ABC").mkdir(parents=True)
    (tmp_path / "triton-cache/ABC/kernel.cubin").write_text("code")
    monkeypatch.setattr(start, "HERE", tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    start.bring_cache()
    start.bring_cache()
    assert (tmp_path / "cache/ABC/kernel.cubin").read_text() == "code"


def test_copied_kernels_have_the_paths_that_triton_expects(start, tmp_path, monkeypatch) -> None:
    entry = tmp_path / "triton-cache/ABC"
    entry.mkdir(parents=True)
    (entry / "kernel.cubin").write_text("code")
    (entry / "__grp__kernel.json").write_text(json.dumps({"child_paths": {"kernel.cubin": "/elsewhere/kernel.cubin"}}))
    monkeypatch.setattr(start, "HERE", tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    start.bring_cache()
    paths = json.loads((tmp_path / "cache/ABC/__grp__kernel.json").read_text())["child_paths"]
    assert Path(paths["kernel.cubin"]).read_text() == "code"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["ABC"]


def test_leftovers_of_an_interrupted_copy_do_not_prevent_the_next(start, tmp_path, monkeypatch) -> None:
    """Each start in a container has the process id 1, and two servers can share the folder."""
    for name in ("ABC", "DEF"):
        (tmp_path / "triton-cache" / name).mkdir(parents=True)
        (tmp_path / "triton-cache" / name / "kernel.cubin").write_text("code")
    monkeypatch.setattr(start, "HERE", tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for name in (".bringing-old", ".bringing-now", ".ABC.1"):
        (tmp_path / "cache" / name / "ABC").mkdir(parents=True)
    os.utime(tmp_path / "cache/.bringing-old", (0, 0))
    copytree = shutil.copytree

    def quicker(source, target, *rest):
        (tmp_path / "cache/DEF").mkdir(exist_ok=True)
        (tmp_path / "cache/DEF/kernel.cubin").write_text("another server's")
        return copytree(source, target, *rest)

    monkeypatch.setattr(start.shutil, "copytree", quicker)
    start.bring_cache()
    assert (tmp_path / "cache/ABC/kernel.cubin").read_text() == "code"
    assert (tmp_path / "cache/DEF/kernel.cubin").read_text() == "another server's"
    assert {path.name for path in (tmp_path / "cache").glob(".b*")} == {".bringing-now"}


@pytest.mark.parametrize("group", ["[]", "{", "{}", '{"child_paths": null}', '{"child_paths": []}'])
def test_the_server_starts_if_kernels_cannot_be_copied(start, tmp_path, monkeypatch, capfd, group) -> None:
    (tmp_path / "triton-cache/ABC").mkdir(parents=True)
    (tmp_path / "triton-cache/ABC/__grp__kernel.json").write_text(group)
    monkeypatch.setattr(start, "HERE", tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    start.bring_cache()
    assert "cannot be filled" in capfd.readouterr().err


def test_the_server_starts_if_the_cache_is_a_file(start, tmp_path, monkeypatch, capfd) -> None:
    (tmp_path / "triton-cache/ABC").mkdir(parents=True)
    (tmp_path / "cache").write_text("")
    monkeypatch.setattr(start, "HERE", tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    start.bring_cache()
    assert "cannot be filled" in capfd.readouterr().err
