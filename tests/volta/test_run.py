"""The runner of a GPU bundle: every row gets a verdict, even if other rows hang or crash the card.

A stand-in takes the driver's place (tests/scripts/driver_stand_in), for there is no GPU here; what it does with the
rows of tests/support/faults.py is what a real card did with them.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.support import faults
from tests.support.checkouts import ROOT
from volta.gpu import card, check, rows, run
from volta.gpu.rows import Row

STAND_IN = ROOT / "tests" / "scripts" / "driver_stand_in"


def bundle(path: Path, content: Sequence[Row]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        rows.write(content, archive)
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A bundle with all faults, and a good row after each."""
    return bundle(tmp_path / "faults.zip", faults.every())


def ran(path: Path, *words: str | Path, driver: Path | None = STAND_IN, **pretended: str) -> tuple[int, str, str]:
    """Run the runner; return its exit status, standard output and standard error."""
    environ = {**os.environ, **{f"STAND_IN_{name}": value for name, value in pretended.items()}}
    environ["PYTHONPATH"] = os.pathsep.join(str(one) for one in (driver, ROOT) if one)
    command = [sys.executable, "-m", "volta.gpu.run", "--bundle", path, *words]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def verdicts(path: Path, told: Path, *words: str | Path, **pretended: str) -> dict[str, dict[str, object]]:
    """Return the verdict of each row by name; later rows replace earlier ones of the same name."""
    ran(path, "--json", told, *words, **pretended)
    return {row["name"]: row for row in json.loads(told.read_text())["rows"]}


def test_passing_rows_give_a_table_and_status_0(tmp_path: Path) -> None:
    path = bundle(tmp_path / "good.zip", [faults.row("one"), faults.row("another")])
    status, said, _ = ran(path, "--markdown", tmp_path / "table.md")
    assert status == 0
    assert re.search(r"2 of 2 rows are right on Stand-in \(7.0\), driver .*for CUDA 12.4, 2", said)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[-1] == "| fill | another | 0.0e+00 | 0.0e+00 | 1.0 | ok |"


@pytest.mark.slow
def test_each_fault_is_reported_and_the_other_rows_run(bad: Path, tmp_path: Path) -> None:
    status, said, _ = ran(bad, "--patience", "3", "--json", tmp_path / "told.json", CAPABILITY="9.0")
    assert status == 1
    told = json.loads((tmp_path / "told.json").read_text())["rows"]
    assert [one["reason"] for one in told if one["name"] == "good"] == [""] * 5
    assert "5 of 10 rows are right" in said
    assert "WRONG  fill: wrong number" in said
    for words in (
        "FAILED: it was killed after 3 s without a result  spin: hangs",
        "FAILED: cuCtxSynchronize: an illegal memory access was encountered  astray: ",
        "FAILED: cuModuleLoadDataEx: a PTX JIT compilation failed (ptxas: Unknown modifier '.such')  garbled: ",
        "FAILED: cuModuleGetFunction: named symbol not found  fill: no such kernel",
    ):
        assert words in said


def test_driver_older_than_the_ptx_is_reported_with_both_versions(tmp_path: Path) -> None:
    path = bundle(tmp_path / "new.zip", [faults.row("new", version="8.7"), faults.row("old", version="7.0")])
    told = verdicts(path, tmp_path / "told.json", CAPABILITY="8.6", CUDA="12.4")
    assert told["new"]["reason"] == (
        "its PTX needs a driver for CUDA 12.8, and this one supports CUDA 12.4: install a newer driver"
    )
    assert told["old"]["error"] == 0


def test_card_of_7_0_loads_the_cubin(tmp_path: Path) -> None:
    path = bundle(tmp_path / "cubin.zip", [with_cubin(faults.row("shipped", version="8.7"))])
    assert verdicts(path, tmp_path / "told.json", CUDA="12.0")["shipped"]["error"] == 0
    assert verdicts(path, tmp_path / "told.json", CUDA="12.0", CAPABILITY="7.5")["shipped"]["error"] is None


def with_cubin(row: Row) -> Row:
    launch = row.launches[0]
    image = rows.Image(launch.image.ptx, b"\x7fELF and more")
    made = rows.Launch(image, launch.symbol, launch.grid, launch.block, launch.arguments)
    return Row(row.name, row.kernels, row.buffers, [made], row.results, row.bound)


def test_row_too_large_for_the_card_is_reported_and_the_next_runs(tmp_path: Path) -> None:
    large = faults.row("large", size=64 << 20)
    path = bundle(tmp_path / "large.zip", [large, faults.row("small")])
    told = verdicts(path, tmp_path / "told.json", FREE=str(16 << 20))
    assert told["large"]["reason"] == "the row needs 64 MiB of the card's memory, and 16 MiB are free"
    assert told["small"]["error"] == 0


@pytest.mark.parametrize(
    ("pretended", "words"),
    [
        ({"CARDS": "0"}, "x the NVIDIA driver of this machine cannot be used (cuInit: no CUDA-capable device"),
        ({"CAPABILITY": "6.1"}, "x Stand-in has compute capability 6.1; 7.0 or newer is needed"),
    ],
)
def test_no_usable_card_gives_a_message_and_status_5(bad: Path, pretended: dict[str, str], words: str) -> None:
    status, said, complained = ran(bad, **pretended)
    assert (status, said) == (5, "")
    assert complained.startswith(words)
    assert complained.count("\n") == 1


def test_missing_driver_bindings_give_a_hint_to_install_them(bad: Path) -> None:
    if has_driver():
        pytest.skip("this machine has a driver; CI has none")
    status, _, complained = ran(bad, driver=None)
    assert status == 5
    assert "pip install cuda-bindings" in complained or "no NVIDIA driver" in complained


def test_invalid_bundle_gives_a_message_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no bundle")
    for path in (tmp_path / "notes.txt", tmp_path / "missing.pyz"):
        status, _, complained = ran(path)
        assert status == 2
        assert "is no bundle" in complained
        assert "make one with ./doit gpu-bundle" in complained


def test_only_selects_rows_by_text_and_rejects_unknown_text(bad: Path) -> None:
    assert ran(bad, "--only", "wrong number", "--list")[1] == "fill: wrong number\n"
    assert ran(bad, "--only", "fill: wrong", "--list")[1] == "fill: wrong number\n"
    status, _, complained = ran(bad, "--only", "nonsense")
    assert status == 2
    assert "--list prints all names" in complained


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--patience", "-1"], "-1 is not from 1 to 86400"),
        (["--patience", "nan"], "nan is not from 1 to 86400"),
        (["--patience", "soon"], "invalid seconds value: 'soon'"),
        (["--json", "missing/told.json"], "x missing/told.json cannot be written: No such file or directory"),
        (["--markdown", "/"], "x / cannot be written: Is a directory"),
    ],
)
def test_wrong_arguments_are_reported_before_a_row_runs(bad: Path, words: list[str], complaint: str) -> None:
    status, said, complained = ran(bad, *words)
    assert (status, said) == (2, "")
    assert complaint in complained
    assert "Traceback" not in complained


@pytest.mark.parametrize("number", ["-1", "7"])
def test_missing_card_number_is_reported_with_the_number_of_cards(bad: Path, number: str) -> None:
    status, _, complained = ran(bad, "--device", number)
    assert status == 5
    assert complained == f"x this machine has no NVIDIA card number {number}: it has 1, numbered from 0\n"


def test_closed_pipe_and_ascii_terminal_are_handled(tmp_path: Path) -> None:
    path = bundle(tmp_path / "many.zip", [faults.row(f"row {number}") for number in range(3000)])
    command = f"{sys.executable} -m volta.gpu.run --bundle {path} --list | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("fill: row 0\n", "")
    few = bundle(tmp_path / "few.zip", [faults.row("one")])
    environ = {**os.environ, "PYTHONPATH": f"{STAND_IN}:{ROOT}", "PYTHONIOENCODING": "ascii"}
    command_words = [sys.executable, "-m", "volta.gpu.run", "--bundle", few]
    assert subprocess.run(command_words, env=environ, capture_output=True).returncode == 0


def test_temporary_folder_is_empty_afterwards(bad: Path, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    with zipfile.ZipFile(bad, "a") as archive:
        tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        for path in STAND_IN.rglob("*.py"):
            archive.write(path, f"site/{tag}/{path.relative_to(STAND_IN)}")
    old = tmp_path / "old" / "cuda"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text("# as an older release of cuda-python has it: it must not hide the bundle's\n")
    environ = {**os.environ, "PYTHONPATH": f"{old.parent}:{ROOT}", "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "volta.gpu.run", "--bundle", bad, "--only", "good"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert "5 of 5 rows are right on Stand-in" in done.stdout, done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_hanging_kernel_ends_when_the_runner_is_killed(bad: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": f"{STAND_IN}:{ROOT}"}
    command = [sys.executable, "-m", "volta.gpu.run", "--bundle", bad, "--only", "hangs"]
    runner = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    while not (workers := psutil.Process(runner.pid).children()):
        time.sleep(0.05)
    runner.kill()
    runner.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert not alive


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def whole(**changed: object) -> Row:
    """Return a valid row with changes."""
    return with_cubin(faults.row("row", **changed))  # type: ignore[arg-type]


def test_valid_row_has_no_flaws() -> None:
    assert list(check.flaws(whole())) == []


@pytest.mark.parametrize(
    ("row", "flaw"),
    [
        (whole(symbol="missing"), "missing is not in its PTX"),
        (whole(before=np.arange(faults.COUNT, dtype=np.int32)), "it passes before a kernel is launched"),
        (whole(right=np.full(faults.COUNT, np.inf)), "its expected result contains only NaN or infinity"),
        (faults.row("row"), "fill has no cubin for 7.0"),
    ],
)
def test_flaws_visible_without_a_gpu_are_reported(row: Row, flaw: str) -> None:
    assert flaw in list(check.flaws(row))


def arguments(*given: rows.Pointer | rows.Number) -> Row:
    row = whole()
    launch = row.launches[0]
    made = rows.Launch(launch.image, "fill", launch.grid, launch.block, given)
    return Row(row.name, row.kernels, row.buffers, [made], row.results, row.bound)


def test_arguments_of_wrong_sizes_are_a_flaw() -> None:
    wrong = arguments(rows.Pointer(0), rows.Number("i64", 1))
    assert "fill has parameters of [8, 4] bytes, but the launch has arguments of [8, 8]" in list(check.flaws(wrong))
    beyond = arguments(rows.Pointer(0, 10_000), rows.Number("u32", 1))
    assert "fill has an argument with an address outside its buffer" in list(check.flaws(beyond))


def test_parameters_are_read_in_every_form_of_ptx() -> None:
    ptx = ".visible .entry k(\n.param .u64 .ptr .global .align 1 a,\n.param .f32 b,\n.param .align 4 .b8 c[12]\n)"
    assert check.parameters(ptx, "k") == [8, 4, 12]
    assert check.parameters(ptx, "other") is None
    assert check.parameters(".visible .entry none()", "none") == []


def test_check_reports_a_damaged_bundle(bad: Path) -> None:
    with zipfile.ZipFile(bad) as archive:
        member = next(member for member in archive.infolist() if member.filename.startswith("arrays/"))
    data = bytearray(bad.read_bytes())
    data[member.header_offset + 30 + len(member.filename) + member.compress_size // 2] ^= 0xFF
    bad.write_bytes(data)
    status, _, complained = ran(bad, "--check")
    assert status == 1
    assert "is damaged: make or copy the bundle again" in complained


def test_driver_release_is_read_from_both_kernel_modules(tmp_path: Path) -> None:
    version = tmp_path / "version"
    for words in ("Kernel Module for x86_64  580.159.04  Release", "x86_64 Kernel Module  535.183.01  Sun May 12"):
        version.write_text(f"NVRM version: NVIDIA UNIX {words}\nGCC version: 12.2.0\n")
        assert card.driver_release(version) == re.findall(r"\d+\.\d+\.\d+", words)[0]
    assert card.driver_release(tmp_path / "missing") == ""


@pytest.fixture
def sleeping(tmp_path: Path) -> Path:
    """A program that replaces the worker and never prints."""
    path = tmp_path / "sleeping.py"
    path.write_text("import time\ntime.sleep(600)\n")
    return path


def test_card_that_never_answers_is_reported_as_no_card(bad: Path, sleeping: Path) -> None:
    made = run.Run(rows.Bundle.open(bad), [sys.executable, str(sleeping)], start=0.5)
    with pytest.raises(run.NoCardError, match="the card did not answer within 0 s"):
        list(made.verdicts([0]))
