"""A wheel with a trusted signature comes from the shared cache; any other is built here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import samples
from tests.support.checkouts import small_checkout
from tests.support.tally import Tally
from voltforge.commands import push
from voltforge.compile.toolchain import Toolchain
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.package import Package
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import files
from voltforge.wheel import provenance, signing

pytestmark = pytest.mark.slow


def package(pipeline: Pipeline) -> Package:
    return pipeline.package(pipeline.recipes["saxpy"])


def receipt(pipeline: Pipeline) -> dict:
    """The receipt, after every stage has run."""
    for stage in package(pipeline).stages.values():
        stage.run()
    return files.read_json(package(pipeline).wheels.path)


def was_compiled(pipeline: Pipeline) -> bool:
    return (pipeline.scratch / "logs" / "saxpy.log").exists()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, toolchain: Toolchain) -> Path:
    """A cache folder with the wheel of another user, and that user's key beside it."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOLTFORGE_KEY", str(folder / "key.pem"))
        patch.setenv("VOLTFORGE_CACHE", str(folder / "cache"))
        signer = signing.make_key(folder / "key.pem")
        theirs = small_checkout(folder / "theirs")
        made = receipt(theirs)
        assert was_compiled(theirs)
        push.push_wheels(theirs)
    (folder / "trusted.pem").write_text(f"a colleague's\n{signer.public}")
    files.write(folder / "sha256", made["results"]["sha256"])
    return folder


@pytest.fixture
def ours(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A new checkout of the same recipe whose owner trusts that key, with a copy of the cache at ``tmp_path/cache``."""
    shutil.copytree(cache / "cache", tmp_path / "cache")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nothing here"))
    monkeypatch.setenv("VOLTFORGE_TRUSTED", str(cache / "trusted.pem"))
    monkeypatch.setenv("VOLTFORGE_CACHE", str(tmp_path / "cache"))
    return small_checkout(tmp_path / "ours")


def test_a_cached_wheel_with_a_trusted_signature_is_used(ours: Pipeline, cache: Path, capsys) -> None:
    kept = receipt(ours)["results"]
    assert not was_compiled(ours)
    assert kept["sha256"] == (cache / "sha256").read_text()
    assert kept["cache"] == str(ours.root.parent / "cache")
    assert kept["hermetic"] is True
    assert kept["linked"] == {"saxpy/_C.abi3.so": 2}
    assert [finding["severity"] for finding in kept["findings"]].count("fail") == 0
    told = capsys.readouterr().out
    assert f"* {kept['file']} from {ours.root.parent / 'cache'}" in told.replace("\n", "")
    assert told.count("saxpy._C") == 1  # it was examined once
    assert package(ours).stages["wheels"].current()


def test_a_cached_wheel_is_checked_again_for_other_expectations(ours: Pipeline) -> None:
    """The key of the build does not depend on the expectations."""
    receipt(ours)
    path = ours.root / "recipes" / "saxpy.toml"
    path.write_text(path.read_text().replace("100 kB", "90 kB"))
    stricter = Pipeline.load(ours.root, ours.settings)
    sizes = [finding["detail"] for finding in receipt(stricter)["results"]["findings"] if finding["check"] == "size"]
    assert "90.0 kB" in sizes[0]
    assert not was_compiled(stricter)


@pytest.mark.parametrize("fault", ["an unknown key", "a wheel that fails its checks", "other bytes", "gone"])
def test_an_unusable_cached_wheel_is_reported_and_built_here(
    ours: Pipeline, cache: Path, tmp_path: Path, monkeypatch, capsys, counted: Tally, fault: str
) -> None:
    wheel = next((tmp_path / "cache" / "wheels").glob("*/*.whl"))
    if fault == "an unknown key":
        other = signing.make_key(tmp_path / "other.pem")
        (tmp_path / "trusted.pem").write_text(other.public)
        monkeypatch.setenv("VOLTFORGE_TRUSTED", str(tmp_path / "trusted.pem"))
        told = "unknown key"
    elif fault == "a wheel that fails its checks":
        statement = next((tmp_path / "cache" / "keys").glob("*/*.jsonl"))
        said = provenance.read(signing.unverified_payload(statement.read_bytes()))
        bad = samples.wheel(tmp_path / "bad", {"saxpy/__init__.py": ""}, name="saxpy", tag="cp310-abi3-linux_x86_64")
        kept = receipt(Pipeline.load(cache / "theirs", Settings()))
        lies = {**kept["results"], "file": bad.name, "sha256": files.sha256(bad)}
        assert said.build_key == lies["build_key"]
        payload = provenance.statement({**kept, "results": lies})
        statement.write_bytes(signing.make_envelope(payload, signing.Signer.load(cache / "key.pem")))
        target = tmp_path / "cache" / "wheels" / files.sha256(bad) / bad.name
        target.parent.mkdir()
        shutil.copy(bad, target)
        told = "fails"
    elif fault == "other bytes":
        wheel.write_bytes(wheel.read_bytes()[:-1] + b"?")
        told = "sha256"
    else:
        files.remove(tmp_path / "cache")
        told = "is not a folder"
    kept = receipt(ours)["results"]
    assert was_compiled(ours)
    assert kept["sha256"] == (cache / "sha256").read_text()
    assert "cache" not in kept
    assert told in capsys.readouterr().out.replace("\n", " ")
    counted("shared cache: faults that neither broke nor tainted a build")
