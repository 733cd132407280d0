"""From recipe to wheelhouse: which stages run again, and what the receipt holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.checkouts import ROOT, edited
from voltforge.commands import verify
from voltforge.compile.toolchain import COMPILERS
from voltforge.errors import VoltforgeError
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.package import Package
from voltforge.pipeline.pipeline import Pipeline
from voltforge.pipeline.stage import Stage
from voltforge.sources import environment
from voltforge.sources.materials import of_lock
from voltforge.system import files
from voltforge.wheel import provenance, sbom, signing, wheelfile
from voltforge.wheel.wheelhouse import PROVENANCE, SBOM


def stages(pipeline: Pipeline) -> dict[str, Stage]:
    return dict(saxpy_package(pipeline).stages)


def run(pipeline: Pipeline) -> list[str]:
    """Run every stage in order; return the kinds that were not current."""
    done = []
    for kind, stage in stages(pipeline).items():
        if not stage.current():
            done.append(kind)
        stage.run()
    return done


def saxpy_package(pipeline: Pipeline) -> Package:
    return pipeline.package(pipeline.recipes["saxpy"])


def rewritten(pipeline: Pipeline, old: str, new: str) -> Pipeline:
    """The checkout after an edit of its recipe."""
    path = pipeline.root / "recipes" / "saxpy.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return Pipeline.load(pipeline.root, pipeline.settings)


def patched(pipeline: Pipeline) -> Path:
    """Write a series of one patch for the package."""
    patch = pipeline.root / "patches" / "saxpy" / "0001-comment.patch"
    patch.parent.mkdir(parents=True)
    patch.write_text(
        "Subject: a comment\n---\n--- a/saxpy/__init__.py\n+++ b/saxpy/__init__.py\n"
        '@@ -1 +1,2 @@\n """A small CUDA extension."""\n+# patched\n'
    )
    return patch


@pytest.mark.slow
def test_nothing_runs_again_without_a_change_or_after_a_comment_in_the_recipe(saxpy: Pipeline) -> None:
    assert run(saxpy) == ["fetch", "tree", "environment", "build", "check", "wheels"]
    assert run(saxpy) == []
    assert run(rewritten(saxpy, 'name = "saxpy"', '# a comment\nname = "saxpy"')) == []


@pytest.mark.slow
def test_a_kept_wheel_stays_current_without_the_build_folder(saxpy: Pipeline) -> None:
    run(saxpy)
    sdist = next((saxpy.scratch / "downloads").glob("*.tar.gz")).read_bytes()
    records = {name: (saxpy.scratch / "stages" / name).read_bytes() for name in ("toolchain.json", "driver-stub.json")}
    for entry in saxpy.scratch.iterdir():
        files.remove(entry)
    files.write(saxpy.scratch / "downloads" / "saxpy-1.0.tar.gz", sdist)
    for name, record in records.items():
        files.write(saxpy.scratch / "stages" / name, record)
    for name in ("toolchains", "driver-stub"):
        (saxpy.scratch / name).symlink_to(ROOT / "build" / name)
    assert run(Pipeline.load(saxpy.root, Settings())) == ["fetch", "tree"]


@pytest.mark.slow
def test_a_copy_of_a_checkout_builds_nothing_again(saxpy: Pipeline, tmp_path: Path) -> None:
    (saxpy.scratch / "toolchains").unlink()
    files.remove(saxpy.scratch / "stages")
    hard_links = {"symlinks": True, "copy_function": os.link}
    shutil.copytree(ROOT / "build" / "toolchains", saxpy.scratch / "toolchains", **hard_links)
    run(saxpy)
    subprocess.run(["cp", "-a", saxpy.root, tmp_path / "copy"], check=True)
    files.remove(saxpy.root)
    copy = Pipeline.load(tmp_path / "copy", Settings())
    texts = [
        path.read_text() for path in (*(copy.scratch / "stages").iterdir(), *copy.wheelhouse.path.glob("receipts/*"))
    ]
    assert texts
    assert not [text for text in texts if str(saxpy.root) in text]
    assert run(copy) in ([], ["toolchain"]), "the copied compilers have other inodes and are hashed again"
    assert run(copy) == []
    for receipt in copy.wheelhouse.path.glob("receipts/*"):
        receipt.unlink()
    assert run(Pipeline.load(copy.root, Settings())) == ["wheels"], "tree, environment and built wheel are intact"


@pytest.mark.slow
def test_only_the_stages_that_depend_on_a_change_run_again(saxpy: Pipeline) -> None:
    run(saxpy)
    patched(saxpy)
    assert run(saxpy) == ["tree", "build", "check", "wheels"]
    assert run(rewritten(saxpy, 'max_size = "100 kB"', 'max_size = "90 kB"')) == ["check", "wheels"]


@pytest.mark.slow
def test_a_damaged_wheel_in_the_wheelhouse_is_replaced(saxpy: Pipeline) -> None:
    run(saxpy)
    (kept,) = saxpy.wheelhouse.path.glob("*.whl")
    good = kept.read_bytes()
    kept.write_bytes(good[:-1] + b"?")
    assert run(saxpy) == ["wheels"]
    assert kept.read_bytes() == good


@pytest.mark.slow
def test_a_wheel_with_other_bytes_is_checked_again_though_its_inputs_are_equal(saxpy: Pipeline) -> None:
    run(saxpy)
    for kept in (stages(saxpy)["wheels"].path, *saxpy.wheelhouse.path.glob("*.whl")):
        files.remove(kept)
    assert run(saxpy) == ["wheels"]
    built = stages(saxpy)["build"]
    record = files.read_json(built.path)
    files.write_json(built.path, {**record, "results": {**record["results"], "sha256": "another"}})
    assert stages(saxpy)["check"].key() != stages(saxpy)["check"].finished().key


@pytest.mark.slow
def test_the_receipt_lists_the_inputs_of_the_wheel(saxpy: Pipeline) -> None:
    run(saxpy)
    receipt = json.loads(saxpy.wheelhouse.receipt("saxpy", environment.python_tag()).read_text())
    made_of, results = receipt["inputs"], receipt["results"]
    assert made_of["source"]["sha256"] == saxpy.recipes["saxpy"].source.sha256
    assert made_of["toolchain"]["nvvm/bin/cicc"]
    assert made_of["environment"]["lock"]["saxpy.txt"] == files.sha256(saxpy.root / "recipes/locks/saxpy.txt")
    assert made_of["variables"]["TORCH_CUDA_ARCH_LIST"] == "7.0"
    assert results["sha256"] == files.sha256(saxpy.wheelhouse.path / results["file"])
    assert {"check": "imports", "severity": "pass", "detail": "saxpy._C"} in results["findings"]
    assert isinstance(results["hermetic"], bool)
    assert str(saxpy.root) not in json.dumps(made_of), "a receipt is the same wherever the checkout lies"


@pytest.mark.slow
def test_a_wheel_that_fails_checks_is_not_kept_and_every_failure_is_listed(saxpy: Pipeline) -> None:
    strict = rewritten(saxpy, 'max_size = "100 kB"', 'max_size = "1 kB"\nrequires = ["torch==2.9.0"]')
    with pytest.raises(VoltforgeError, match=r"fails 2 checks and was not kept") as caught:
        run(strict)
    assert "METADATA does not require torch==2.9.0" in caught.value.what
    assert "more than the allowed 1.0 kB" in caught.value.what
    assert not list(strict.wheelhouse.path.glob("*.whl"))
    assert not strict.wheelhouse.receipt("saxpy", environment.python_tag()).exists()


@pytest.mark.slow
def test_any_wheel_can_be_checked_against_the_recipe_of_its_project(saxpy: Pipeline) -> None:
    run(saxpy)
    (kept,) = saxpy.wheelhouse.path.glob("*.whl")
    findings = saxpy.examined(kept)
    assert {finding.severity for finding in findings} <= {"pass", "note"}
    assert any(finding.check == "imports" for finding in findings)
    with pytest.raises(VoltforgeError, match="does not exist"):
        saxpy.examined(Path("nowhere.whl"))


def refused(pipeline: Pipeline) -> str:
    """The error of ./doit verify."""
    with pytest.raises(VoltforgeError) as caught:
        verify.verify_wheels(pipeline)
    return caught.value.what


@pytest.mark.slow
def test_verify_fails_if_wheel_index_and_provenance_disagree(saxpy: Pipeline, capsys) -> None:
    run(saxpy)
    house = saxpy.wheelhouse
    (kept,) = house.wheels()
    verify.verify_wheels(saxpy)
    assert "wheel, index, receipt and provenance agree" in " ".join(capsys.readouterr().out.split())
    of_it, of_all = f"{kept.path.name} fails 1 checks", "the wheelhouse fails 1 checks"

    def changed(path: Path, old: str, new: str) -> str:
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new, 1))
        said = refused(saxpy)
        path.write_text(before)
        return said

    sha256, page = files.sha256(kept.path), house.path / "simple" / "saxpy" / "index.html"
    other = sha256[:-1] + ("0" if sha256[-1] != "0" else "1")
    assert changed(house.beside(kept.path, PROVENANCE), '"payload":"', '"payload":"A') == of_it
    assert changed(page, sha256, other) == f"{of_it}; {of_all}"
    foreign = '<a href="http://evil.example/saxpy-9.0-py3-none-any.whl">saxpy-9.0-py3-none-any.whl</a><br>\n  </body>'
    assert changed(page, "</body>", foreign) == of_all
    verify.verify_wheels(saxpy)


@pytest.mark.slow
def test_verify_of_an_empty_wheelhouse_fails_with_a_sentence(saxpy: Pipeline) -> None:
    assert refused(saxpy) == "the wheelhouse is empty"


@pytest.mark.slow
def test_sbom_and_provenance_list_every_input_with_its_hash(saxpy: Pipeline) -> None:
    patch = patched(saxpy)
    run(saxpy)
    house, recipe = saxpy.wheelhouse, saxpy.recipes["saxpy"]
    (kept,) = house.wheels()
    document = house.beside(kept.path, SBOM).read_bytes()
    assert wheelfile.sbom_bytes(kept.path) == document
    assert sbom.problems(document) == []
    assert [one["diff"]["url"] for one in json.loads(document)["metadata"]["component"]["pedigree"]["patches"]] == [
        f"{patch.name}#sha256={files.sha256(patch)}"
    ]
    said = provenance.read(signing.unverified_payload(house.beside(kept.path, PROVENANCE).read_bytes()))
    assert said.sbom == {"file": f"{kept.path.name}{SBOM}", "sha256": files.sha256_bytes(document)}
    assert all(material.sha256 for material in said.materials)
    hashes = {(material.kind, material.name): material.sha256 for material in said.materials}
    assert hashes["source", "saxpy"] == (recipe.source.sha256,)
    assert hashes["patch", patch.name] == (files.sha256(patch),)
    lock, *entries = of_lock(recipe.beside(recipe.build.lock))
    assert hashes["lock", lock.name] == lock.sha256
    assert entries
    assert {("package", entry.name): entry.sha256 for entry in entries}.items() <= hashes.items()
    home = saxpy.toolchain.result().home
    assert {name: hashes.get(("compiler", name)) for name in COMPILERS} == {
        name: (files.sha256(home / name),) for name in COMPILERS
    }


@pytest.mark.slow
def test_an_edited_source_without_its_hash_in_the_recipe_is_refused(saxpy: Pipeline) -> None:
    before = saxpy.recipes["saxpy"].source.sha256
    changed = edited(saxpy, "csrc/scale.cu", "x[i] *= a", "x[i] *= a + 1")
    stale = rewritten(changed, changed.recipes["saxpy"].source.sha256, before)
    with pytest.raises(VoltforgeError) as caught:
        run(stale)
    assert before in str(caught.value)
    assert changed.recipes["saxpy"].source.sha256 in str(caught.value)
