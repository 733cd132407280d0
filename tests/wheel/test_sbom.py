"""Tests of SBOMs of unpacked wheels: content, requirements and materials; valid and reproducible."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import uuid
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.checkouts import ROOT
from tests.support.samples import EPOCH, compiled, unpacked
from voltforge import PIPELINE_VERSION
from voltforge.sources import materials
from voltforge.sources.materials import KINDS, Material
from voltforge.system import files
from voltforge.wheel import sbom
from voltforge.wheel.sbom import SbomError
from voltforge.wheel.wheelfile import WheelError

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
REQUIRES = """\
Requires-Dist: torch==2.9.0
Requires-Dist: Typing_Extensions>=4
Requires-Dist: tomli; python_version < "3.11"
Requires-Dist: ray[cgraph]; extra == "ray"
Requires-Dist: numpy<3; python_version < "3.12"
Requires-Dist: numpy; python_version >= "3.12"
Requires-Dist: numpy[fast]; extra == "ray"
"""
MATERIALS = (
    Material("vllm", "source", "0.12.0", "pkg:pypi/vllm@0.12.0?file_name=vllm-0.12.0.tar.gz", (A,)),
    Material("torch.tar.gz", "source", "", "https://example.invalid/torch.tar.gz", (B,)),
    Material("0001-cut downloads.patch", "patch", sha256=(A,)),
    Material("0002-less.patch", "patch", sha256=(B,)),
    Material("vllm.toml", "recipe", sha256=(A,)),
    Material("vllm-build.txt", "lock", sha256=(B,)),
    Material("cmake", "package", "3.31.10", "pkg:pypi/cmake@3.31.10", (A, B, C)),
    Material("jinja2", "package", "3.1.6", "pkg:pypi/jinja2@3.1.6", (A,)),
    Material("bin/nvcc", "compiler", "12.4.131", sha256=(C,)),
)
HASHES = st.sampled_from([A, B, C])
ANY = st.builds(
    Material,
    st.text(min_size=1, max_size=6),
    st.sampled_from(KINDS),
    st.text(max_size=9),
    st.sampled_from(
        ["", "pkg:pypi/torch@2.9.0%2Bcu128", "pkg:deb/debian/make@4.3~1?arch=amd64", "https://a.invalid/b"]
    ),
    st.lists(HASHES, max_size=3, unique=True).map(tuple),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return an unpacked wheel with an extension, a library and Python files."""
    room = tmp_path_factory.mktemp("wheel")
    extension = compiled(room / "made" / "_C.so", "int answer(void) { return 42; }")
    content = {"vllm/__init__.py": "", "vllm/_C.abi3.so": extension, "vllm.libs/libx.so.1": extension, "vllm/a.so": "x"}
    return unpacked(room / "unpacked", content, name="vllm", version="0.12.0", metadata=REQUIRES)


def described(folder: Path, *materials: Material, epoch: int = EPOCH) -> dict:
    return json.loads(sbom.describe(folder, name="vllm", version="0.12.0+sm70", materials=materials, epoch=epoch))


@pytest.fixture(scope="module")
def document(folder) -> dict:
    return described(folder, *MATERIALS)


def components(document: dict, scope: str) -> dict[str, dict]:
    return {component["name"]: component for component in document["components"] if component["scope"] == scope}


def sha256(value: str) -> dict:
    return {"alg": "SHA-256", "content": value}


# --- content ---


def test_wheel_is_the_described_component(document):
    described = document["metadata"]["component"]
    assert (described["type"], described["name"], described["version"]) == ("library", "vllm", "0.12.0+sm70")
    assert described["purl"] == "pkg:pypi/vllm@0.12.0%2Bsm70"
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")


def test_tool_is_voltforge_without_the_cyclonedx_library(document):
    [tool] = document["metadata"]["tools"]["components"]
    assert (tool["name"], tool["version"]) == ("voltforge", str(PIPELINE_VERSION))
    assert "cyclonedx-python" not in json.dumps(document)


def test_native_binaries_are_listed_with_hashes(folder, document):
    binaries = {
        name: component for name, component in components(document, "required").items() if component["type"] == "file"
    }
    assert {name: component["hashes"] for name, component in binaries.items()} == {
        name: [sha256(files.sha256(folder / name))] for name in ("vllm/_C.abi3.so", "vllm.libs/libx.so.1")
    }


def test_requirements_are_listed_without_a_version(document):
    requirements = {
        name: component
        for name, component in components(document, "required").items()
        if component["type"] == "library"
    }
    assert {name: component["purl"] for name, component in requirements.items()} == {
        name: f"pkg:pypi/{name}" for name in ("torch", "typing-extensions", "tomli", "numpy")
    }
    assert not any("version" in component for component in requirements.values())
    assert sorted(component["value"] for component in requirements["numpy"]["properties"]) == [
        'numpy; python_version >= "3.12"', 'numpy<3; python_version < "3.12"', 'numpy[fast]; extra == "ray"',
    ]  # fmt: skip


def test_requirement_of_an_extra_is_optional(document):
    assert [*components(document, "optional")] == ["ray"]


def test_wheel_depends_on_requirements_and_not_on_build_tools(document):
    names = {entry["bom-ref"]: entry["name"] for entry in document["components"]}
    graph = {entry["ref"]: entry.get("dependsOn", []) for entry in document["dependencies"]}
    wanted = {names[ref] for ref in graph.pop(document["metadata"]["component"]["bom-ref"])}
    assert wanted == {"torch", "typing-extensions", "tomli", "numpy", "ray"}
    assert not any(graph.values())


def test_sources_and_patches_are_the_pedigree(document):
    pedigree = document["metadata"]["component"]["pedigree"]
    source, torch = sorted(pedigree["ancestors"], key=lambda ancestor: ancestor["name"], reverse=True)
    assert (source["name"], source["version"], source["hashes"]) == ("vllm", "0.12.0", [sha256(A)])
    assert source["purl"] == MATERIALS[0].uri
    assert torch["externalReferences"] == [
        {"type": "distribution", "url": "https://example.invalid/torch.tar.gz", "hashes": [sha256(B)]}
    ]
    assert pedigree["patches"] == [
        {"type": "unofficial", "diff": {"url": f"0001-cut%20downloads.patch#sha256={A}"}},
        {"type": "unofficial", "diff": {"url": f"0002-less.patch#sha256={B}"}},
    ]


def test_build_tools_have_scope_excluded(document):
    tools = components(document, "excluded")
    assert {name: component["type"] for name, component in tools.items()} == {
        "vllm.toml": "file", "vllm-build.txt": "file", "cmake": "library", "jinja2": "library",
        "bin/nvcc": "application",
    }  # fmt: skip
    assert tools["bin/nvcc"]["hashes"] == [sha256(C)]
    assert tools["jinja2"]["hashes"] == [sha256(A)]
    assert "externalReferences" not in tools["jinja2"]


def test_package_with_several_permitted_files_has_all_hashes_as_reference(document):
    cmake = components(document, "excluded")["cmake"]
    assert "hashes" not in cmake
    assert cmake["externalReferences"] == [
        {"type": "distribution", "url": "pkg:pypi/cmake@3.31.10", "hashes": [sha256(A), sha256(B), sha256(C)]}
    ]


def test_packages_of_a_real_lock_are_described(folder):
    locks = [*materials.of_lock(ROOT / "recipes/locks/vllm-build.txt")]
    document = described(folder, *locks)
    assert {package["name"] for package in document["components"]} > {package.name for package in locks}


def test_wheel_without_requirements_gives_no_warning(tmp_path):
    bare = unpacked(tmp_path, {"bare.py": ""})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        document = described(bare, MATERIALS[4])
    assert [component["name"] for component in document["components"]] == ["vllm.toml"]


# --- reproducible ---


@settings(max_examples=15, deadline=None)  # the schema's check of an address takes 10 ms
@given(st.lists(ANY, max_size=4), st.randoms(use_true_random=False))
def test_materials_in_any_order_give_the_same_valid_document(folder, materials, order):
    shuffled = materials + materials[:1]
    order.shuffle(shuffled)
    documents = [
        sbom.describe(folder, name="vllm", version="1", materials=group, epoch=EPOCH) for group in (materials, shuffled)
    ]
    assert documents[0] == documents[1]
    assert sbom.problems(documents[0]) == []
    tools = [entry for entry in set(materials) if entry.kind not in ("source", "patch")]
    assert sum(entry["scope"] == "excluded" for entry in json.loads(documents[0])["components"]) == len(tools)


def test_sbom_is_the_same_in_another_process_and_environment(folder, tmp_path):
    work = (
        "import json, sys; from pathlib import Path\n"
        "from voltforge.sources.materials import from_json; from voltforge.wheel import sbom\n"
        "folder, epoch, *materials = map(json.loads, sys.argv[1:])\n"
        "materials = list(map(from_json, materials))\n"
        "made = sbom.describe(Path(folder), name='vllm', version='1', materials=materials, epoch=epoch)\n"
        "sys.stdout.buffer.write(made)"
    )
    copy = tmp_path / "another"
    shutil.copytree(folder, copy)
    elsewhere = {**os.environ, "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "7", "LC_ALL": "C", "HOME": "/nonexistent"}
    values = [str(copy), EPOCH, *(materials.as_json(material) for material in sorted(MATERIALS, reverse=True))]
    words = [sys.executable, "-W", "error::UserWarning", "-c", work, *map(json.dumps, values)]
    done = subprocess.run(words, cwd=ROOT, env=elsewhere, capture_output=True, check=True)
    assert done.stdout == sbom.describe(folder, name="vllm", version="1", materials=MATERIALS, epoch=EPOCH)
    assert done.stderr == b""


def test_serial_number_depends_on_the_content(folder, document):
    again = described(folder, *random.sample(MATERIALS, len(MATERIALS)))
    other = described(folder, *MATERIALS[1:])
    assert document["serialNumber"] == again["serialNumber"] != other["serialNumber"]
    assert uuid.UUID(document["serialNumber"]).version == 5


def test_timestamp_is_the_epoch_in_utc(folder):
    assert described(folder, epoch=1_700_000_000)["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"


# --- refused input ---


@pytest.mark.parametrize("wrong", ["a requirement", "no METADATA"])
def test_wheel_with_unreadable_metadata_is_refused(tmp_path, wrong):
    folder = unpacked(tmp_path / "a", {}, metadata="Requires-Dist: ===\n")
    if wrong == "no METADATA":
        (folder / "sample-1.0.dist-info" / "METADATA").unlink()
    with pytest.raises(SbomError, match="METADATA and its requirements cannot be read"):
        described(folder)


def test_sbom_of_a_folder_without_dist_info_is_refused(tmp_path):
    with pytest.raises(WheelError, match="dist-info"):
        described(tmp_path)


@pytest.mark.parametrize(
    "uri",
    ["pkg:", "pkg:pypi", "https://a.invalid/%zz", "https://a.invalid/#b#c", "https://a.invalid\\b", "https://a|b"],
)
def test_invalid_address_is_refused(folder, uri):
    with pytest.raises(SbomError):
        described(folder, Material("one", "package", "1", uri, (A,)))


@pytest.mark.parametrize("epoch", [10**15, -(10**15)])
def test_epoch_outside_the_calendar_is_refused(folder, epoch):
    with pytest.raises(SbomError, match="cannot be described"):
        described(folder, epoch=epoch)


# --- the schema ---


def test_a_valid_document_has_no_problems(document):
    assert sbom.problems(json.dumps(document).encode()) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"more": 1}, "more"),
        ({"specVersion": "2.0", "bomFormat": "SPDX"}, r"\$\.bomFormat"),
        ({"serialNumber": "1"}, r"\$\.serialNumber"),
        ({"components": [{"name": "nameless type"}]}, r"\$\.components\[0\].*'type' is a required"),
        ({"components": [{"type": "file", "name": "a", "hashes": [{"alg": "SHA-256", "content": "x"}]}]}, "content"),
        ({"metadata": {"timestamp": "yesterday"}}, "yesterday"),
    ],
    ids=["a key more", "another format", "no serial number", "no type", "no hash", "no time"],
)
def test_schema_violation_is_reported_with_its_path(document, change, where):
    violations = sbom.problems(json.dumps({**document, **change}).encode())
    assert re.search(where, " ".join(violations))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_document_that_is_not_json_is_reported(content):
    assert sbom.problems(content) == ["it is not JSON"]
