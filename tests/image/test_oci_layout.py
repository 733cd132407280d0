"""OCI archives of equal content are equal, and hold one image, its full name and its health check."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from tests.support.images import small_image
from voltforge.image import container_engine, oci_layout


@pytest.mark.slow
def test_equal_contents_give_equal_archives_and_a_change_moves_only_its_layer(
    engine_works: None, tmp_path: Path
) -> None:
    one, two = (small_image(tmp_path / name, f"localhost/voltforge-test:{name}", "b") for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    small_image(tmp_path / "other", "localhost/voltforge-test:other", "c")
    first, second = (oci_layout.layer_sizes(tmp_path / name / "layout") for name in ("one", "other"))
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False]


@pytest.mark.slow
def test_an_archive_is_the_same_whatever_was_built_before_it(
    engine_works: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that an engine takes from its cache bear the labels of the image that they were made for."""
    if container_engine.choose().kind == "docker":
        pytest.skip("docker has one store, and buildah and podman are what images are built with in CI")
    made = []
    for name, earlier in (("used", ["old"]), ("empty", [])):
        store = tmp_path / name / "storage.conf"
        store.parent.mkdir()
        folders = {part: store.parent / part for part in ("graphroot", "runroot")}
        store.write_text(
            '[storage]\ndriver = "vfs"\n' + "".join(f'{key} = "{path}"\n' for key, path in folders.items())
        )
        monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(store))
        for label in (*earlier, "new"):
            path = small_image(tmp_path / name / label, "localhost/voltforge-test:stores", "b", label, stays=True)
        made.append(path.read_bytes())
    assert made[0] == made[1]


@pytest.mark.slow
def test_an_archive_holds_one_image_that_needs_no_name_to_be_inspected(engine_works: None, tmp_path: Path) -> None:
    path = small_image(tmp_path / "one", "localhost/voltforge-test:names", "b")
    command = ["skopeo", "inspect", "--config", f"oci-archive:{path}"]
    config = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["config"]
    assert config["Labels"]["a.label"] == "b"
    assert config["User"] == "1000"


@pytest.mark.slow
def test_an_archive_has_the_full_name_of_its_image_and_a_health_check(engine_works: None, tmp_path: Path) -> None:
    path = small_image(tmp_path / "one", "localhost/voltforge-test:names", "b")
    with tarfile.open(path) as tar:
        contents = [tar.extractfile(member).read() for member in tar if member.isfile() and "sha256" in member.name]
        [entry] = json.loads(tar.extractfile("index.json").read())["manifests"]
    assert entry["annotations"][oci_layout.IMAGE_NAME] == "localhost/voltforge-test:1.0"
    configs = [json.loads(content) for content in contents if content.startswith(b"{") and b"rootfs" in content]
    assert [config["config"]["Healthcheck"] for config in configs] == [{"Test": ["CMD", "true"]}]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("podman"), reason="podman is not installed; CI installs it")
def test_podman_loads_an_archive_under_its_full_name(engine_works: None, tmp_path: Path) -> None:
    path = small_image(tmp_path / "one", "localhost/voltforge-test:names", "b")
    with tempfile.TemporaryDirectory() as short:  # podman refuses a --runroot of more than 50 characters
        store = ["--root", f"{short}/store", "--runroot", f"{short}/run", "--storage-driver", "vfs"]
        done = subprocess.run(["podman", *store, "load", "-i", path], capture_output=True, text=True, check=True)
    assert "localhost/voltforge-test:1.0" in done.stdout
