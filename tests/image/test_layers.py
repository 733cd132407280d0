"""Every file of the environment is in one layer of the image, or left out for a stated reason."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.support.samples import compiled, wheel
from voltforge.image import layers
from voltforge.image.layers import lay_out, reachable
from voltforge.image.leave_out import ImageError, LeaveOut
from voltforge.sources import environment
from voltforge.sources.environment import Environment
from voltforge.sources.index import Indexes

SCRIPTS = "[console_scripts]\nquick = quick:main\ngone = quick:gone\n"


@pytest.fixture
def settled(tmp_path: Path) -> Environment:
    """A real environment with small wheels in it: vllm needs torch, torch an NVIDIA library, other nobody."""
    lock = tmp_path / "empty.txt"
    lock.write_text("")
    made = environment.create(lock, tmp_path / "environment", Indexes(None), offline=True)
    library = compiled(tmp_path / "lib.so", "int one(void) { return 1; }", "-g")
    quick = {"quick.py": "", "quick-1.0.dist-info/entry_points.txt": SCRIPTS}
    for name, content, requires in (
        ("vllm", {"vllm/__init__.py": "", "vllm/_C.so": library}, ["torch==1.0", "x; extra == 'more'"]),
        ("torch", {"torch/__init__.py": "", "torch/tests/a.py": "a"}, ["nvidia-cublas-cu12", "small[fast]"]),
        ("nvidia_cublas_cu12", {"nvidia/__init__.py": "", "nvidia/cublas/lib/libcublas.so.12": library}, []),
        ("nvidia_other_cu12", {"nvidia/__init__.py": "", "nvidia/other/lib/libother.so.1": library}, []),
        ("small", {"small.py": ""}, ["quick; extra == 'fast'"]),
        ("quick", quick, []),
    ):
        metadata = "".join(f"Requires-Dist: {require}\n" for require in requires)
        environment.install_wheel(made, wheel(tmp_path / name, content, name=name, metadata=metadata))
    return made


def test_the_roots_and_their_requirements_are_reachable_extras_included(settled: Environment) -> None:
    assert reachable(settled, ("vllm", "torch")) == {"vllm", "torch", "nvidia-cublas-cu12", "small", "quick"}
    with pytest.raises(ImageError, match="the lock lacks ray, which a wheel requires"):
        reachable(settled, ("vllm", "ray"))


def leave_out(tmp_path: Path, text: str) -> LeaveOut:
    path = tmp_path / "leave-out.toml"
    path.write_text(text)
    return LeaveOut.load(path)


OMITTED = """
[[files]]
project = "torch"
patterns = ["torch/tests/*"]
why = "tests"

[[entry_points]]
project = "quick"
lines = ["gone = quick:gone"]

[[strip]]
project = "vllm"
patterns = ["vllm/_C.so"]
why = "debug data"
"""


def test_every_file_is_in_one_layer_and_left_out_files_are_listed(settled: Environment, tmp_path: Path) -> None:
    projects = reachable(settled, ("vllm", "torch"))
    content = lay_out(settled, projects, leave_out(tmp_path, OMITTED), tmp_path / "context")
    found = {layer: files_of(tmp_path / "context" / layer) for layer in layers.LAYERS}
    everything = [name for names in found.values() for name in names]
    assert len(everything) == len(set(everything))
    site = f"{layers.PREFIX}/{settled.site_packages.relative_to(settled.path)}"
    assert f"{site}/torch/__init__.py" in found["torch"]
    assert f"{site}/nvidia/cublas/lib/libcublas.so.12" in found["nvidia-cublas-cu12"]
    assert f"{site}/quick.py" in found["packages"]
    assert not [name for name in everything if "other" in name or "/tests/" in name or "direct_url" in name]
    told = {part.what: part for part in content.left_out}
    assert told["torch: torch/tests/*"].size == 1
    assert told["nvidia-other-cu12"].why == "not required by the image"
    assert told["vllm: vllm/_C.so"].size > 0
    assert content.layers["vllm"] == content.projects["vllm"]


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_record_and_entry_points_name_only_files_of_the_image(settled: Environment, tmp_path: Path) -> None:
    lay_out(settled, reachable(settled, ("vllm",)), leave_out(tmp_path, OMITTED), tmp_path / "context")
    [record] = (tmp_path / "context/torch").rglob("RECORD")
    assert "torch/__init__.py" in record.read_text()
    assert "tests" not in record.read_text()
    [entries] = (tmp_path / "context/packages").rglob("entry_points.txt")
    assert entries.read_text() == "[console_scripts]\nquick = quick:main\n"
    original = next(settled.site_packages.glob("torch-*/RECORD"))
    assert "tests" in original.read_text(), "the environment shares its files with uv's cache"


def test_united_layers_are_the_environment_without_the_left_out_files(settled: Environment, tmp_path: Path) -> None:
    lay_out(settled, reachable(settled, ("vllm",)), leave_out(tmp_path, OMITTED), tmp_path / "context")
    site = settled.site_packages.relative_to(settled.path)
    with layers.united(tmp_path / "context", tmp_path / "united") as united:
        assert {"torch", "vllm", "nvidia", "quick.py"} <= {path.name for path in (united / site).iterdir()}
        assert not (united / site / "torch/tests").exists()
        stripped = united / site / "vllm/_C.so"
        assert stripped.stat().st_size < (settled.site_packages / "vllm/_C.so").stat().st_size
    assert not (tmp_path / "united").exists()


def test_every_user_can_read_the_image_whatever_the_umask(settled, tmp_path) -> None:
    [library] = settled.site_packages.glob("nvidia/cublas/lib/*.so*")
    library.chmod(0o700)
    before = os.umask(0o077)
    try:
        lay_out(settled, reachable(settled, ("vllm",)), leave_out(tmp_path, OMITTED), tmp_path / "context")
        layers.set_modes(tmp_path / "context")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "context").rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o755}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o755, 0o644}
    assert stat.S_IMODE(library.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[files]]\nproject = "torch"\npatterns = ["torch/none/*"]\nwhy = "x"', "names files that do not exist"),
        ('[[entry_points]]\nproject = "quick"\nlines = ["none = a:b"]', "names entry points that do not exist"),
        ('[[files]]\nproject = "torch"\nwhy = "x"', "files.0.patterns"),
        ("files = ", "cannot be read"),
    ],
)
def test_a_rule_that_matches_nothing_or_is_malformed_is_refused(settled, tmp_path, text, said) -> None:
    with pytest.raises(ImageError, match=said):
        lay_out(settled, reachable(settled, ("vllm",)), leave_out(tmp_path, text), tmp_path / "context")
