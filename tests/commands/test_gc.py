"""The files that `./doit gc` lists and removes, in synthetic checkouts with the real recipes and in a built one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pipeline.test_pipeline import rewritten, run
from tests.support.checkouts import ROOT, edited
from tests.support.rights import ordinary_user
from voltforge.commands import gc
from voltforge.commands.gc import LEFT_OVER, Item
from voltforge.errors import VoltforgeError
from voltforge.image.stages import RuntimeImage
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources.recipe import RecipeError, load
from voltforge.system import files

WORK = "build/work"
OLD, NEW, NEWER = "0" * 12, "a" * 12, "b" * 12
"""Keys in the names of folders."""
CUDA = "build/toolchains/distro-12.4.131-"
IMAGE = "build/image/voltforge-{}-sm70.oci.tar"
WHEEL = "{}-1.0-py3-none-any.whl"
TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"
OTHER = "cp310" if TAG != "cp310" else "cp311"
VLLM = load(ROOT / "recipes" / "vllm.toml").source
STOCK = {source.file.split("-")[2]: source for source in load(ROOT / "recipes" / "torch-thin.toml").wheels}


@pytest.fixture(autouse=True, scope="module")
def nothing_is_in_use() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "AT_REST", -1.0)
        yield


class Made:
    """A checkout with the recipes of this one, and files that are made up."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        for name in ("recipes", "patches"):
            (root / name).symlink_to(ROOT / name)
        self.pipeline = Pipeline.load(root, Settings())
        self.runtime = RuntimeImage(self.pipeline)

    def put(self, *names: str, data: str | bytes = "content") -> Path:
        """Files of these names, and folders where a name ends with a slash; gives the last."""
        for name in names:
            path = self.root / name
            file = path / "file" if name.endswith("/") else path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def record(self, stage: str, results: Any, inputs: Any = None) -> None:
        kept = {"stage": stage, "key": "", "inputs": inputs or {}, "results": results}
        self.put(f"build/stages/{self.pipeline.record(stage).name}", data=json.dumps(kept))

    def choose(self, key: str) -> None:
        """Say that the toolchain is the one of that key."""
        self.put(f"{CUDA}{key}/")
        self.toolchain(f"{CUDA}{key}", key)

    def toolchain(self, home: str, key: str = "") -> None:
        """Record a toolchain at ``home``."""
        host = {"cxx": "/usr/bin/g++", "cc": "/usr/bin/gcc", "version": "12.2.0"}
        words = {"home": home, "origin": "distro", "version": "12.4.131", "host": host}
        self.record("toolchain", {**words, "identity": {"nvcc": key}})

    def image(self, path: str) -> None:
        """Record an image at ``path``."""
        sizes = {"size": 1, "base_size": 1, "projects": {}, "layers": {}}
        self.record("image", {"path": path, "sha256": "", "name": "", "compressed": [], "left_out": [], **sizes})

    def built(self, name: str, key: str, inputs: Any = None) -> None:
        """Say that the last build of a package is the one of that key."""
        path = self.put(f"build/wheels/{name}-{key}/") / WHEEL.format(name)
        self.record(f"build:{name}", {"path": str(path), "sha256": ""}, inputs)

    def receive(self, name: str, python: str, source: Any, file: str, **more: Any) -> Path:
        """A receipt."""
        receipt = {"inputs": {"source": source}, "results": {"name": name, "file": file, **more}}
        return self.put(f"wheelhouse/receipts/{name}-{python}.json", data=json.dumps(receipt))

    def unneeded(self) -> list[Item]:
        return gc.unneeded(self.pipeline, self.runtime)

    def listed(self) -> dict[str, str]:
        """The kind of each thing that is not needed, by its path in the checkout."""
        return {item.path.relative_to(self.root).as_posix(): item.kind for item in self.unneeded()}

    def foreign(self) -> list[str]:
        found = gc.foreign(self.pipeline, self.runtime)
        return [item.path.relative_to(self.root).as_posix() for item in found]

    def report(self, delete: bool = False) -> None:
        gc.report(self.pipeline, self.runtime, delete)

    def work(self, name: str, **choices: str) -> str:
        """The work folder of a build with these choices, as the pipeline itself would call it."""
        recipe = load(self.root / "recipes" / f"{name}.toml", {"torch": "source", "cudnn": "1", **choices})
        made_of = self.pipeline.package(recipe).maker.inputs()
        key = files.digest({part: made_of[part] for part in ("arch", "environment", "toolchain", "variables")})
        return f"{WORK}/{name}-{key[:12]}/"


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "checkout")


def home(sha256: str, file: str = "") -> str:
    return f"build/downloads/{sha256[:16]}/{file}".rstrip("/")


def aged(path: Path, seconds: int) -> None:
    os.utime(path, ns=(10**18 - seconds * 10**9,) * 2)


def test_history_and_caches_always_stay(made):
    made.put("build/history/vllm.json", "build/cache/ccache/0/object", "build/gate/launcher.py")
    assert made.listed() == {}
    assert made.foreign() == []


# --- by name ---


@pytest.mark.parametrize(
    ("name", "listed", "kind"),
    [
        ("build/trees/gone/", "", "trees"),
        ("build/environments/gone-build/", "", "environments"),
        ("build/environments/vllm-verify/", "", LEFT_OVER),
        (f"{WORK}/gone-{OLD}/", "", "work"),
        (f"build/wheels/gone-{OLD}/", "", "wheels"),
        ("build/logs/gone.log", "", "logs"),
        ("build/reproduce/vllm/", "", "reproduce"),
        ("build/bench/thin/", "", LEFT_OVER),
        ("build/gpu/tmpab3_9xyz/", "", LEFT_OVER),
        ("build/image/context/", "", LEFT_OVER),
        ("build/image/base.tar", "", LEFT_OVER),
        ("build/tmpab3_9xyz/", "", LEFT_OVER),
        ("build/thin/.thin-ab3_9xyz/", "", LEFT_OVER),
        (f"build/toolchains/.distro-12.4.131-{OLD}.ab3_9xyz/", "", LEFT_OVER),
        ("build/environments/.vllm-build.ab3_9xyz/", "", LEFT_OVER),
        ("build/environments/.vllm-build.ab3_9xyz.old/", "", LEFT_OVER),
        ("build/stages/.build-vllm.json.ab3_9xyz", "", LEFT_OVER),
        (f"{WORK}/vllm-{OLD}/.tree.manifest.json.ab3_9xyz", "", LEFT_OVER),
        (f"{WORK}/vllm-{OLD}/tmpab3_9xyz/", "", LEFT_OVER),
        ("build/downloads/rejected/vllm-0.12.0.tar.gz-00", "build/downloads/rejected", "downloads"),
        ("build/downloads/0123456789abcdef/old.tar.gz", "build/downloads/0123456789abcdef", "downloads"),
        (home(VLLM.sha256, f".{VLLM.file}.ab3_9xyz"), "", LEFT_OVER),
        (home(VLLM.sha256, "vllm-under-another-name.tar.gz"), "", "downloads"),
        (home(STOCK[OTHER].sha256, STOCK[OTHER].file), home(STOCK[OTHER].sha256), "downloads"),
        (f"wheelhouse/{WHEEL.format('gone')}.metadata", "", "wheelhouse"),
        (f"wheelhouse/{WHEEL.format('gone')}.cdx.json", "", "wheelhouse"),
        (f"wheelhouse/{WHEEL.format('gone')}.intoto.jsonl", "", "wheelhouse"),
        (f"wheelhouse/.{WHEEL.format('gone')}.ab3_9xyz", "", LEFT_OVER),
        ("wheelhouse/.simple.ab3_9xyz.old/", "", LEFT_OVER),
        ("wheelhouse/receipts/.vllm-cp311.json.ab3_9xyz", "", LEFT_OVER),
    ],
)
def test_unneeded_files_are_listed_by_kind_and_removed(made, name, listed, kind):
    made.put(name)
    assert made.listed() == {listed or name.rstrip("/"): kind}
    made.report(delete=True)
    assert made.unneeded() == []
    assert not (made.root / name).exists()


@pytest.mark.parametrize(
    "name",
    [
        "build/trees/vllm/",
        "build/trees/torch/",
        "build/environments/vllm-build/",
        "build/environments/torch-build/",
        "build/logs/torch.log",
        "build/logs/reproduce-vllm.log",
        "build/logs/reproduce-image.log",
        "build/logs/run.log",
        "build/reproduce/vllm.json",
        f"{WORK}/vllm-{OLD}/",
        f"build/wheels/torch-{OLD}/",
        f"{CUDA}{OLD}/",
        f"build/toolchains/driver-stub-{OLD}/",
        IMAGE.format("0.12.0"),
        "build/stages/build-vllm.json",
        "build/stages/of-nobody-knows-what.json",
        "build/stages/history.json",
        "build/bench/build_vllm.json",
        "build/gpu/images/",
        "build/gpu/voltforge-gpu-0.12.0-sm70.pyz",
        "build/profile/vllm.svg",
        "build/stages/gpu-bundle.json",
        "build/triton.json",
        "build/bench/serve/",
        "build/trust.counts",
        "build/doit.sqlite",
        "build/.run-lock",
        home(VLLM.sha256, VLLM.file),
        home(VLLM.sha256, f"{VLLM.sha256}.part"),
        home(VLLM.sha256, ".lock"),
        f"build/downloads/{VLLM.file}",
        f"build/downloads/{STOCK[TAG].file}",
        home(STOCK[TAG].sha256, STOCK[TAG].file),
        "wheelhouse/README.md",
        "wheelhouse/simple/index.html",
        "wheelhouse/.my.settings",
        "wheelhouse/nginx.conf",
        "recipes.txt",
        "tmpab3_9xyz/",
    ],
)
def test_files_that_a_recipe_may_need_are_not_listed(made, name):
    made.put(name)
    assert made.listed() == {}
    assert made.foreign() == []


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        (f"wheelhouse/{WHEEL.format('brought')}", ""),
        ("build/downloads/by-hand-1.0.tar.gz", ""),
        ("build/downloads/a-mirror/", ""),
        ("build/thin/torch-2.9.0+sm70.thin-cp311-cp311-manylinux_2_28_x86_64.whl", ""),
        ("build/notes.txt", ""),
        ("build/caches/", ""),
        (f"{WORK}/an-experiment/", ""),
        ("build/toolchains/cuda-12.6/bin/nvcc", "build/toolchains/cuda-12.6"),
        ("build/image/notes", ""),
        (f"build/wheels/gone-{OLD}", ""),
    ],
)
def test_foreign_files_are_listed_and_stay(made, name, listed):
    path = made.put(name)
    assert made.foreign() == [(listed or name).rstrip("/")]
    made.report(delete=True)
    assert path.exists()


def test_files_beside_a_foreign_wheel_stay(made):
    wheel = made.put(f"wheelhouse/{WHEEL.format('brought')}.metadata", f"wheelhouse/{WHEEL.format('brought')}")
    assert made.listed() == {}
    wheel.unlink()
    assert made.listed() == {f"wheelhouse/{WHEEL.format('brought')}.metadata": "wheelhouse"}


# --- by records ---


def test_only_the_recorded_toolchain_stays_and_all_without_a_record(made):
    made.put(f"{CUDA}{OLD}/", f"build/toolchains/driver-stub-{OLD}/")
    made.choose(NEW)
    assert sorted(made.listed()) == [f"{CUDA}{OLD}", f"build/toolchains/driver-stub-{OLD}"]
    made.pipeline.toolchain.path.unlink()
    assert made.listed() == {}


def test_the_drivers_stub_stays(made, tmp_path):
    made.put("build/driver-stub/libcuda.so.1")
    assert made.listed() == {}
    assert made.foreign() == []


def test_a_toolkit_of_the_machine_makes_those_of_the_checkout_unneeded(made, tmp_path):
    made.put(f"{CUDA}{OLD}/")
    made.toolchain(str(tmp_path))
    assert sorted(made.listed()) == [f"{CUDA}{OLD}"]


def test_a_record_of_a_missing_toolchain_is_ignored(made):
    made.put(f"{CUDA}{OLD}/")
    made.toolchain("/nowhere/cuda")
    assert made.listed() == {}


def test_a_moved_checkout_keeps_the_same_files(made, tmp_path):
    made.choose(NEW)
    made.put(f"{CUDA}{OLD}/", f"build/wheels/vllm-{OLD}/")
    made.built("vllm", NEW)
    made.root.rename(tmp_path / "elsewhere")
    moved = Pipeline.load(tmp_path / "elsewhere", Settings())
    found = [item.path.name for item in gc.unneeded(moved, RuntimeImage(moved))]
    assert sorted(found) == [f"distro-12.4.131-{OLD}", f"vllm-{OLD}"]


def test_only_the_last_built_wheel_stays_and_all_without_a_record(made):
    made.put(f"build/wheels/vllm-{OLD}/", f"build/wheels/torch-{OLD}/")
    made.built("vllm", NEW)
    assert made.listed() == {f"build/wheels/vllm-{OLD}": "wheels"}
    made.pipeline.record("build:vllm").write_text("{")
    assert made.listed() == {}


def test_a_wheel_from_the_shared_cache_stays_in_the_downloads(made):
    path = made.put("build/downloads/0123456789abcdef/vllm.whl")
    made.record("build:vllm", {"path": str(path), "sha256": ""})
    assert made.listed() == {}


def test_the_work_folders_of_every_choice_and_the_newest_stay(made):
    made.choose(NEW)
    made.record("tree:torch", {"path": str(made.root / "build/trees/torch"), "epoch": 1})
    with_cudnn, without = made.work("torch"), made.work("torch", cudnn="0")
    assert with_cudnn != without
    made.built("torch", NEW)
    folders = [with_cudnn, without, *(f"{WORK}/torch-{key}/" for key in (OLD, NEW, NEWER))]
    for age, folder in enumerate(folders):
        aged(made.put(folder), -age)
    assert sorted(made.listed()) == [f"{WORK}/torch-{OLD}", f"{WORK}/torch-{NEW}"]
    made.pipeline.record("tree:torch").unlink()
    assert made.listed() == {}, "what the builds would go on in cannot be told"


def test_the_work_folder_of_a_kept_wheel_stays(made):
    made.choose(NEW)
    made.record("tree:vllm", {"path": str(made.root / "build/trees/vllm"), "epoch": 1})
    made.built("vllm", NEW)
    then = {"arch": ["7.0"], "environment": {}, "toolchain": {}, "variables": {"A": "1"}}
    theirs = f"{WORK}/vllm-{files.digest(then)[:12]}"
    for age, folder in enumerate([f"{theirs}/", f"{WORK}/vllm-{OLD}/", f"{WORK}/vllm-{NEW}/"]):
        aged(made.put(folder), -age)
    assert sorted(made.listed()) == sorted([theirs, f"{WORK}/vllm-{OLD}"])
    receipt = made.receive("vllm", "cp39", {"file": VLLM.file, "sha256": VLLM.sha256}, "vllm.whl")
    files.write_json(
        receipt, {**json.loads(receipt.read_text()), "inputs": {"source": {"file": "", "sha256": ""}, **then}}
    )
    assert sorted(made.listed()) == [f"{WORK}/vllm-{OLD}"]


def test_only_the_recorded_image_stays_and_all_without_a_record(made):
    image = made.put(IMAGE.format("0.11.0"), IMAGE.format("0.12.0"))
    made.image(str(image))
    assert made.listed() == {IMAGE.format("0.11.0"): "image"}
    made.pipeline.record("image").unlink()
    assert made.listed() == {}


def test_records_of_removed_recipes_are_unneeded(made):
    for stage in ("build:gone", "build:vllm", "image:base"):
        made.record(stage, {})
    assert made.listed() == {"build/stages/build-gone.json": "stages"}


# --- by receipts ---


def test_files_named_by_a_receipt_stay(made):
    stock, archive, old = STOCK[OTHER], "c" * 64, "d" * 64
    for sha256, file in ((stock.sha256, stock.file), (archive, "nvcc.tar.xz"), (old, "vllm-0.11.0.tar.gz")):
        made.put(home(sha256, file))
    assert set(made.listed()) == {home(stock.sha256), home(archive), home(old)}
    made.receive("torch", OTHER, {"file": stock.file, "sha256": stock.sha256}, "torch.whl")
    made.receive(
        "vllm", TAG, {"file": "vllm-0.11.0.tar.gz", "sha256": old}, "vllm.whl", materials=[{"sha256": [archive]}]
    )
    assert made.listed() == {}


def test_a_wheel_with_a_receipt_is_not_foreign(made):
    made.put(f"wheelhouse/{WHEEL.format('vllm')}")
    assert made.foreign() == [f"wheelhouse/{WHEEL.format('vllm')}"]
    made.receive("vllm", TAG, {"file": VLLM.file, "sha256": VLLM.sha256}, WHEEL.format("vllm"))
    assert made.foreign() == []


@pytest.mark.parametrize("materials", ['"materials": [1]', '"materials": 1', '"name": null'])
def test_an_unreadable_receipt_keeps_all_downloads_and_work_folders(made, materials):
    made.choose(NEW)
    made.record("tree:vllm", {"path": str(made.root / "build/trees/vllm"), "epoch": 1})
    made.built("vllm", NEW)
    for age, key in enumerate([OLD, NEW]):
        aged(made.put(f"{WORK}/vllm-{key}/"), -age)
    made.put(home("c" * 64, "nvcc.tar.xz"), "build/downloads/rejected/one", "build/trees/gone/")
    unneeded = {"build/trees/gone": "trees", "build/downloads/rejected": "downloads"}
    assert made.listed() == {**unneeded, f"{WORK}/vllm-{OLD}": "work", home("c" * 64): "downloads"}
    inputs = '"inputs": {"source": {"file": "vllm.tar.gz", "sha256": "00"}}'
    receipt = f'{{{inputs}, "results": {{"name": "vllm", "file": "vllm.whl", {materials}}}}}'
    made.put("wheelhouse/receipts/vllm-cp39.json", data=receipt)
    assert made.listed() == unneeded
    files.remove(made.root / "wheelhouse")
    made.put("wheelhouse/receipts")
    assert made.listed() == unneeded, "the folder of receipts itself cannot be read"


def test_a_partial_download_of_a_complete_file_is_unneeded(made):
    part = made.put(home(VLLM.sha256, f"{VLLM.sha256}.part"))
    made.put(home(VLLM.sha256, VLLM.file), data=b"cut short")
    assert made.listed() == {}
    os.truncate(made.root / home(VLLM.sha256, VLLM.file), VLLM.size)
    assert list(made.listed()) == [part.relative_to(made.root).as_posix()]


def test_all_stock_wheels_stay_if_this_python_has_none(made, monkeypatch):
    made.put(home(STOCK[OTHER].sha256, STOCK[OTHER].file))
    monkeypatch.setattr("voltforge.pipeline.from_wheel.sys_tags", lambda: iter(()))
    assert made.listed() == {}


# --- what it weighs ---


def test_the_largest_kinds_and_files_are_listed_first(made):
    for name, size in (("trees/b", 300), ("trees/a", 900), ("logs/gone.log", 500), ("environments/gone", 1000)):
        made.put(f"build/{name}" if "." in name else f"build/{name}/", data=b"x" * size * 1000)
    found = [(item.kind, item.path.name) for item in made.unneeded()]
    assert found == [("trees", "a"), ("trees", "b"), ("environments", "gone"), ("logs", "gone.log")]


def test_only_files_without_another_link_count_as_freed(made, tmp_path):
    folder = made.put("build/environments/gone/", data=os.urandom(100_000))
    files.write(tmp_path / "cache", os.urandom(300_000))
    for name in ("linked", "linked again"):
        os.link(tmp_path / "cache", folder / name)
    [item] = made.unneeded()
    blocks = {name: (folder / name).stat().st_blocks * 512 for name in ("", "file", "linked")}
    assert (item.size, item.shared) == (blocks[""] + blocks["file"], blocks["linked"])
    assert gc.remove([item]).freed == item.size
    assert (tmp_path / "cache").stat().st_size == 300_000


# --- removal ---


def test_no_link_is_followed(made, tmp_path):
    outside = tmp_path / "outside"
    for name in (f"distro-12.4.131-{OLD}", f"vllm-{OLD}", "gone", "0123456789abcdef"):
        files.write(outside / name / "precious", "content")
    made.put("build/trees/gone/")
    (made.root / "build/trees/gone/link").symlink_to(outside)
    (made.root / "build/environments").mkdir()
    (made.root / "build/environments/gone").symlink_to(outside / "gone")
    for folder in ("toolchains", "work", "downloads", "reproduce"):
        (made.root / "build" / folder).symlink_to(outside)
    made.toolchain(str(tmp_path))
    assert made.listed() == {"build/trees/gone": "trees"}
    made.report(delete=True)
    assert len([*outside.rglob("precious")]) == 4
    assert (made.root / "build/environments/gone").is_symlink()


@pytest.mark.parametrize("folder", ["build", "wheelhouse"])
def test_a_linked_folder_is_not_entered(made, tmp_path, folder, capsys):
    other = Made(tmp_path / "other")
    other.put("build/trees/gone/", "wheelhouse/.simple.ab3_9xyz/")
    (made.root / folder).symlink_to(other.root / folder)
    assert made.listed() == {}
    made.report()
    assert f"links that were not followed: {folder}\n" in capsys.readouterr().out


def test_files_that_cannot_be_removed_are_named_and_the_rest_removed(capsys):
    with ordinary_user(), tempfile.TemporaryDirectory() as room:
        made = Made(Path(room, "checkout"))
        made.put("build/trees/gone/", "build/logs/gone.log", "build/environments/gone/")
        items = made.unneeded()
        os.chmod(made.root / "build/trees", 0o555)
        with pytest.raises(VoltforgeError, match=r"trees/gone could not be removed: Permission denied") as caught:
            made.report(delete=True)
        assert caught.value.what.count("\n") == 1
        assert made.listed() == {"build/trees/gone": "trees"}
        freed = files.size(sum(item.size for item in items if item.kind != "trees"))
        assert f"* freed {freed}\n" in capsys.readouterr().out
        os.chmod(made.root / "build/trees", 0o755)


def test_a_killed_removal_leaves_no_partial_folder_under_its_name(made, monkeypatch):
    made.choose(NEW)
    made.put(f"{CUDA}{OLD}/")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            made.report(delete=True)
    assert not (made.root / f"{CUDA}{OLD}").exists()
    assert list(made.listed().values()) == [LEFT_OVER]
    made.report(delete=True)
    assert [path.name for path in (made.root / "build/toolchains").iterdir()] == [f"distro-12.4.131-{NEW}"]


def test_recently_changed_folders_stay(made, monkeypatch):
    made.put("build/reproduce/vllm/", "build/tmpab3_9xyz/", "build/thin/.torch.whl.ab3_9xyz", "build/trees/gone/")
    monkeypatch.setattr(gc, "AT_REST", 3600.0)
    assert made.listed() == {"build/trees/gone": "trees"}


def test_removal_waits_for_a_running_build_and_listing_does_not(made):
    gone = made.put("build/trees/gone/")
    with (made.root / "build" / ".run-lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        made.report()
        removal = threading.Thread(target=made.report, args=(True,))
        removal.start()
        removal.join(0.3)
        assert removal.is_alive()
        assert gone.exists()
    removal.join(10)
    assert not gone.exists()


def test_a_broken_recipe_removes_nothing(tmp_path):
    made = Made(tmp_path / "checkout")
    (made.root / "recipes").unlink()
    gone = made.put("build/trees/gone/", "recipes/vllm.toml", "build/trees/vllm/")
    with pytest.raises(RecipeError):
        made.report(delete=True)
    assert gone.exists()
    assert (made.root / "build/trees/gone").exists()


# --- what is said ---


def test_the_list_states_files_reasons_and_the_next_command(made, capsys):
    made.put("build/trees/gone/", data=b"x" * 1_000_000)
    made.put("build/logs/gone.log", f"wheelhouse/{WHEEL.format('brought')}")
    made.report()
    said = capsys.readouterr().out
    for words in (
        "files that no recipe needs", "trees, 1.0 MB", "build/trees/gone",
        "no recipe compiles a source of this name",
        "build/logs/gone.log", "│ all", "files that gc never removes", f"wheelhouse/{WHEEL.format('brought')}",
        "./doit gc gc=delete removes",
    ):  # fmt: skip
        assert words in said
    assert "other links" not in said
    assert (made.root / "build/trees/gone").exists()
    made.report(delete=True)
    assert "* freed 1.0 MB" in capsys.readouterr().out
    made.report(delete=True)
    said = capsys.readouterr().out
    assert "nothing to remove" in said
    assert "* freed 0 B" in said


def test_the_container_store_is_mentioned_if_an_image_was_made(made, capsys):
    made.put("build/trees/gone/")
    made.report()
    assert "buildah" not in capsys.readouterr().out
    made.put(IMAGE.format("0.12.0"))
    made.report()
    assert "buildah rmi --prune" in capsys.readouterr().out.splitlines()[-1]


def test_hard_linked_files_are_reported_as_freeing_nothing(made, tmp_path, capsys):
    folder = made.put("build/environments/gone/", data=b"x" * 1_000_000)
    os.link(folder / "file", tmp_path / "cache")
    made.report()
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "1.0 MB have other links" in said
    assert "a file with other links frees nothing" in said


# --- any mixture ---

NAMES = st.sampled_from(["vllm", "torch", "gone", "vllm-build", "torch-build", "vllm-verify"])
KEYS = st.sampled_from([OLD, NEW, NEWER])
RANDOM = st.sampled_from(["ab3_9xyz", "________"])
PLACES = st.sampled_from(
    ["", "toolchains/", "trees/", "environments/", "work/", "wheels/", "logs/", "stages/", "image/", "reproduce/",
     "bench/", "gpu/", "thin/", "downloads/",
     f"downloads/{VLLM.sha256[:16]}/", f"work/vllm-{OLD}/", f"wheels/torch-{NEW}/"]
)  # fmt: skip
SOURCES = st.sampled_from(
    [(VLLM.sha256, VLLM.file), *((one.sha256, one.file) for one in STOCK.values()), ("e" * 64, "old.tar.gz")]
)
SLASH = st.sampled_from(["", "/"])
ENTRIES = st.one_of(
    st.builds((WORK + "/{}-{}{}").format, NAMES, KEYS, SLASH),
    st.builds("build/wheels/{}-{}/".format, NAMES, KEYS),
    st.builds("build/toolchains/{}-{}/".format, st.sampled_from(["distro-12.4.131", "redist-1", "driver-stub"]), KEYS),
    st.builds("build/{}/{}/".format, st.sampled_from(["trees", "environments", "reproduce", "downloads"]), NAMES),
    st.builds("build/{}/{}.log".format, st.sampled_from(["logs", "work"]), NAMES),
    st.builds("build/stages/{}-{}.json".format, st.sampled_from(["build", "tree", "verify"]), NAMES),
    SOURCES.map(lambda source: home(*source)),
    SOURCES.map(lambda source: home(source[0], f"{source[0]}.part")),
    SOURCES.map(lambda source: f"build/downloads/{source[1]}"),
    st.builds("build/{}.{}.{}{}{}".format, PLACES, NAMES, RANDOM, st.sampled_from(["", ".old"]), SLASH),
    st.builds("build/{}{}{}".format, PLACES, st.text("ab.-_0", min_size=1, max_size=20), SLASH),
    st.builds("build/image/{}".format, st.sampled_from(["context/", "runtime.txt", "voltforge-1-sm70.oci.tar"])),
    st.builds("wheelhouse/{}{}".format, NAMES.map(WHEEL.format), st.sampled_from(["", *gc.COMPANIONS])),
    st.builds("wheelhouse/.{}.{}".format, NAMES.map(WHEEL.format), RANDOM),
)
ROTTEN = "{"


@st.composite
def records(draw) -> list[tuple[str, ...]]:
    """Return the records to write, as arguments of a method of a checkout."""
    chosen = draw(st.lists(st.one_of(
        st.tuples(st.just("choose"), KEYS),
        st.tuples(st.just("built"), st.sampled_from(["vllm", "torch", "gone"]), KEYS),
        st.tuples(st.just("tree"), st.sampled_from(["vllm", "torch"])),
        st.tuples(st.just("image"), st.sampled_from(["1", "2"])),
        st.tuples(st.just("receive"), NAMES, st.sampled_from([TAG, OTHER]), SOURCES),
    ), max_size=8))  # fmt: skip
    return draw(st.permutations(chosen))


def laid_out(root: Path, entries: list[str], recorded: list[tuple[Any, ...]]) -> Made:
    made = Made(root)
    for name in entries:
        if not re.search(r"/\.{1,2}/?$", name):
            try:
                made.put(name)
            except OSError:  # a file where another name wants a folder, or the other way round
                continue
    for what, *words in recorded:
        if what == "tree":
            made.record(f"tree:{words[0]}", {"path": "", "epoch": 1})
        elif what == "image":
            made.image(f"/somewhere/voltforge-{words[0]}-sm70.oci.tar")
        elif what == "receive":
            name, python, (sha256, file) = words
            made.receive(name, python, {"file": file, "sha256": sha256}, WHEEL.format(name))
        else:
            getattr(made, what)(*words)
    return made


def everything(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if not path.is_symlink()}


@settings(deadline=None, max_examples=40)
@given(st.lists(ENTRIES, max_size=30), records())
def test_delete_removes_exactly_the_listed_files(entries, recorded):
    with tempfile.TemporaryDirectory() as room:
        made = laid_out(Path(room, "checkout"), entries, recorded)
        needed = gc.needed(made.pipeline, made.runtime)
        before, items, foreign = everything(Path(room)), made.unneeded(), made.foreign()
        removed = gc.remove(items)
        assert removed.problems == ()
        assert removed.freed == sum(item.size for item in items)
        gone = before - everything(Path(room))
        listed = {item.path for item in items}
        assert gone == {path for path in before if listed & {path, *path.parents}}
        assert not gone & needed
        inside = [path for path in gone if needed & {*path.parents}]
        assert all(re.search(r"/\.[^/]+\.(ab3_9xyz|________)(\.old)?(/|$)", str(path)) for path in inside), (
            "what goes out of a folder that is needed is only what a killed run left"
        )
        assert made.unneeded() == []
        assert made.foreign() == foreign


@settings(deadline=None, max_examples=100)
@given(st.lists(ENTRIES, max_size=30), records(), st.data())
def test_a_lost_or_damaged_record_never_removes_more(entries, recorded, data):
    with tempfile.TemporaryDirectory() as room:
        made = laid_out(Path(room, "checkout"), entries, recorded)
        before = set(made.listed())
        kept = sorted(path for path in made.root.glob("*/*/*.json") if path.parent.name in ("stages", "receipts"))
        for path in data.draw(st.lists(st.sampled_from(kept), unique=True)) if kept else []:
            if path.parent.name == "stages" and data.draw(st.booleans()):
                path.unlink()
            else:
                path.write_text(ROTTEN)
        assert all(before & {name, *map(str, Path(name).parents)} for name in made.listed())


# --- a real one ---


@pytest.mark.slow
def test_the_next_build_reuses_what_gc_leaves(saxpy: Pipeline):
    def listed(pipeline: Pipeline) -> set[str]:
        found = gc.unneeded(pipeline, RuntimeImage(pipeline))
        return {item.path.relative_to(pipeline.scratch).as_posix() for item in found}

    def folders() -> set[str]:
        return {f"{kind}/{path.name}" for kind in ("work", "wheels") for path in (saxpy.scratch / kind).iterdir()}

    assert run(saxpy)
    first = folders()
    assert len(first) == 2
    files.write(saxpy.scratch / "work" / f"saxpy-{OLD}" / "tree" / "object.o", "the newest, of other settings")
    assert listed(saxpy) == set()
    files.remove(saxpy.scratch / "work" / f"saxpy-{OLD}")
    gc.remove(gc.unneeded(saxpy, RuntimeImage(saxpy)))
    assert folders() == first
    assert run(saxpy) == []
    changed = edited(saxpy, "csrc/scale.cu", "x[i] *= a", "x[i] *= a + 1")
    changed = rewritten(changed, "env = { TORCH", 'env = { NVCC_THREADS = "1", TORCH')
    assert "build" in run(changed)
    assert listed(changed) == first
    gc.report(changed, RuntimeImage(changed), delete=True)
    assert len(folders() - first) == len(folders()) == 2
    assert run(changed) == []
    assert gc.foreign(changed, RuntimeImage(changed)) == []


@pytest.mark.parametrize(("choice", "removed"), [("", False), ("delete", True)])
def test_unneeded_files_are_removed_only_with_gc_delete(saxpy: Pipeline, capsys, choice: str, removed: bool) -> None:
    stale = saxpy.scratch / "trees" / "gone" / "old.c"
    files.write(stale, b"0" * 5000)
    pipeline = Pipeline.load(saxpy.root, Settings(gc=choice))
    gc.collect(pipeline, RuntimeImage(pipeline))
    assert "trees/gone" in capsys.readouterr().out
    assert stale.exists() != removed
    assert os.listdir(saxpy.scratch / "toolchains")


def test_unknown_value_of_gc_is_refused_and_removes_nothing(saxpy: Pipeline) -> None:
    stale = saxpy.scratch / "trees" / "gone" / "old.c"
    files.write(stale, b"0" * 5000)
    pipeline = Pipeline.load(saxpy.root, Settings(gc="yes"))
    with pytest.raises(VoltforgeError, match="gc=yes: unknown value"):
        gc.collect(pipeline, RuntimeImage(pipeline))
    assert stale.exists()
