"""The vLLM sdist becomes a verified sm_70 wheel that pip and uv install."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.support.checkouts import ROOT, doit
from tests.support.vllm_python import VllmPython
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import environment, patches, tree
from voltforge.sources.environment import Environment, unmet_requirements
from voltforge.sources.fetch import Artifact
from voltforge.sources.index import configured
from voltforge.sources.tree import Tree
from voltforge.wheel import wheelfile
from voltforge.wheel.checks import verify

pytestmark = pytest.mark.build


@pytest.fixture(scope="module")
def receipt(vllm: Pipeline) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads(
        vllm.wheelhouse.receipt("vllm", environment.python_tag()).read_text()
    )
    return found


@pytest.fixture(scope="module")
def made(vllm: Pipeline) -> wheelfile.Wheel:
    (found,) = [wheel for wheel in vllm.wheelhouse.wheels() if wheel.name == "vllm"]
    return found


@pytest.fixture(scope="module")
def patched(vllm: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The sources after all patches."""
    recipe = vllm.recipes["vllm"]
    series = patches.series(vllm.root / "patches" / "vllm")
    return tree.create(vllm.store.get(recipe.source.artifact), series, tmp_path_factory.mktemp("vllm") / "tree")


def called(folder: Path, pattern: str) -> Sequence[str]:
    """Return the matching lines of the package's Python files, with their paths."""
    found = []
    for path in sorted((folder / "vllm").rglob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(pattern, line):
                found.append(f"{path.relative_to(folder)}: {line.strip()}")
    return found


def test_wheel_version_names_the_toolkit_and_tag_allows_all_pythons(
    made: wheelfile.Wheel, receipt: dict[str, dict[str, object]]
) -> None:
    assert re.fullmatch(r"0\.12\.0\+sm70\.cu12\d", str(made.version))
    assert {(tag.interpreter, tag.abi) for tag in made.tags} == {("cp38", "abi3")}
    assert made.path.stat().st_size < 20_000_000
    assert receipt["results"]["linked"] == {
        "vllm/_C.abi3.so": 7,
        "vllm/_moe_C.abi3.so": 2,
        "vllm/cumem_allocator.abi3.so": 0,
    }


def test_merged_sources_are_exactly_those_no_longer_compiled_separately(repository: Path) -> None:
    """0018-compiled-together."""
    patch = (repository / "patches/vllm/0018-compiled-together.patch").read_text()
    included = re.findall(r'^\+#include "\.\./(.+\.cu)"$', patch, re.MULTILINE)
    assert len(included) > 30
    assert sorted(included) == sorted({*re.findall(r'^- +"csrc/(.+\.cu)"\)?$', patch, re.MULTILINE)})


def test_every_check_passes_and_is_in_the_receipt(receipt: dict[str, dict[str, object]]) -> None:
    findings = receipt["results"]["findings"]
    assert isinstance(findings, list)
    assert not [finding for finding in findings if finding["severity"] == "fail"]
    assert {"wheel", "tag", "extensions", "device code", "build paths", "RUNPATH", "symbols", "imports", "size"} <= {
        finding["check"] for finding in findings if finding["severity"] == "pass"
    }


def test_second_run_reports_current_and_builds_nothing(vllm: Pipeline) -> None:
    said = doit("wheels:vllm")
    assert "wheels:vllm is current" in said
    assert "* build" not in said


def test_pip_prefers_the_wheelhouse_over_the_default_index(vllm: Pipeline, tmp_path: Path) -> None:
    """The index also has the stock wheel of the same version; only the local version part makes this wheel newer."""
    plain = configured()
    assert plain.default
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    simple = (vllm.wheelhouse.path / "simple").as_uri()
    words = [
        "install",
        "--dry-run",
        "--no-deps",
        "--quiet",
        "--report",
        str(tmp_path / "report.json"),
        "--index-url",
        simple,
    ]
    environ = {**os.environ, "PIP_EXTRA_INDEX_URL": plain.default, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    subprocess.run([tmp_path / "fresh/bin/python", "-m", "pip", *words, "vllm==0.12.0"], check=True, env=environ)
    (chosen,) = json.loads((tmp_path / "report.json").read_text())["install"]
    assert "+sm70" in chosen["metadata"]["version"]
    assert chosen["download_info"]["url"].startswith(vllm.wheelhouse.path.as_uri())


def test_all_requirements_are_installed(installed: Environment) -> None:
    assert unmet_requirements(installed) == []


@pytest.mark.parametrize(
    "check",
    [
        "the_worker_and_the_server_import",
        "attention_is_tritons_and_flash_attention_is_refused_in_words",
        "rotary_embedding_turns_by_the_angle",
        "dropped_kernels_say_that_they_were_dropped",
        "the_command_line_explains_itself",
    ],
)
def test_vllm_runs_on_a_simulated_volta(check: str, vllm_python: VllmPython) -> None:
    """No GPU exists here: the platform reports capability 7.0, and no kernel runs."""
    vllm_python.run(ROOT / "tests" / "scripts" / "pretended_volta.py", check)


def test_no_cuda_path_uses_an_omitted_kernel(patched: Tree) -> None:
    calls = [line for line in called(patched.path, r"\bpaged_attention_v[12]\b") if "def " not in line]
    elsewhere = ("_ipex_ops.py", "rocm_aiter_fa.py", "_custom_ops.py")
    assert not [line for line in calls if not any(name in line for name in elsewhere)], calls
    assert "paged_attention_v" not in (patched.path / "CMakeLists.txt").read_text()


def test_build_for_7_0_downloads_nothing(patched: Tree) -> None:
    text = (patched.path / "CMakeLists.txt").read_text()
    assert "GIT_REPOSITORY" not in text
    for module in ("qutlass", "vllm_flash_attn", "flashmla", "triton_kernels"):
        assert f"include(cmake/external_projects/{module}.cmake)" not in text


def test_requirements_unusable_on_sm_70_are_removed(made: wheelfile.Wheel) -> None:
    always = {require.name for require in made.requires if not require.marker or require.marker.evaluate({"extra": ""})}
    assert {"torch", "triton", "numba", "torchvision"} <= always
    assert not {"flashinfer-python", "ray", "torchaudio"} & always


def test_header_reduction_edits_no_source(repository: Path) -> None:
    (diet,) = (repository / "patches" / "vllm").glob("*-header-diet.patch")
    touched = set(re.findall(r"^\+\+\+ b/(\S+)", diet.read_text(), re.MULTILINE))
    assert "csrc/lean/torch/all.h" in touched
    assert {path for path in touched if not path.startswith("csrc/lean/")} == {"CMakeLists.txt", "cmake/utils.cmake"}


def test_each_patch_has_reason_upstream_and_recheck_fields(repository: Path) -> None:
    for patch in patches.series(repository / "patches" / "vllm"):
        header = patch.path.read_text().split("\n---\n")[0]
        for field in ("Subject: ", "Why: ", "Upstream: ", "Re-check: "):
            assert f"\n{field}" in f"\n{header}", f"{patch.path.name} lacks {field}"


def test_findings_on_the_stock_wheel_match_the_record(vllm: Pipeline, repository: Path) -> None:
    """Run every check that needs no environment on a real wheel of 467 MB and compare the findings with the record."""
    stock = vllm.store.get(
        Artifact(
            file="vllm-0.12.0-cp38-abi3-manylinux_2_31_x86_64.whl",
            sha256="596673edcac5ea8ab8cb2d9b0200052978cd91d78a054926d9d0c6895d34237f",
            size=466_530_617,
            index="vllm",
        )
    )
    recipe = vllm.recipes["vllm"]
    expect = replace(vllm.package(recipe).maker.expectation(), ops=(), imports=())
    found = [asdict(finding) for finding in verify(stock, expect)]
    assert found == json.loads((repository / "tests" / "records" / "stock-vllm-0.12.0.json").read_text())
