"""The kernels that the patched vLLM selects on a pretended Volta, and the messages with which it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkouts import ROOT
from tests.support.vllm_python import VllmPython
from voltforge.sources import patches
from voltforge.sources.environment import Environment

pytestmark = pytest.mark.build

Answers = Mapping[tuple[str, str, str, str], Mapping[str, str]]
FIRST_CHOICE = 7
"""Patches 0001 to 0006 make vLLM build and start; the first patch that changes the selection."""


def read(lines: str) -> Answers:
    found = [json.loads(line) for line in lines.splitlines()]
    return {tuple(one.pop(key) for key in ("quantization", "family", "kv_cache", "cards")): one for one in found}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file for the tables of the documentation."""
    return tmp_path_factory.mktemp("choices") / "tables.md"


@pytest.fixture(scope="module")
def answers(vllm_python: VllmPython, tables: Path) -> Answers:
    """The whole table at 7.0."""
    return read(vllm_python.run("-m", "volta.kernel_selection", "--markdown", tables))


def of(
    answers: Answers, quantization: str, family: str, kv_cache: str = "auto", cards: str = "one"
) -> Mapping[str, Any]:
    return answers[quantization, family, kv_cache, cards]


def test_experts_never_use_marlin(answers: Answers) -> None:
    """0007-moe-without-marlin."""
    assert of(answers, "AWQ", "Mixtral")["experts"] == "MoeWNA16Method"
    assert of(answers, "compressed-tensors W4A16", "Qwen3 MoE")["experts"] == "CompressedTensorsWNA16MoEMethod"
    assert not [answer for answer in answers.values() if "Marlin" in answer["experts"] + answer["linear"]]


def test_awq_layers_use_triton(answers: Answers) -> None:
    """0008-awq-from-7.0."""
    assert of(answers, "AWQ", "Llama")["linear"] == "AWQLinearMethod (Triton)"
    assert of(answers, "AWQ", "Mixtral")["linear"] == "AWQLinearMethod (Triton)"


def test_w4a16_layers_use_exllama(answers: Answers) -> None:
    """0009-w4a16-from-7.0."""
    for quantization in ("W4A16", "W4A16, per channel", "W8A16"):
        assert of(answers, f"compressed-tensors {quantization}", "Qwen2")["linear"] == "ExllamaLinearKernel"


@pytest.mark.parametrize(
    "check",
    [
        "awq_calls_triton_for_one_token_and_for_many",
        "exllama_has_one_row_of_zero_points_for_weights_per_channel",
    ],
)
def test_selected_kernels_are_called_correctly(check: str, vllm_python: VllmPython) -> None:
    """0008-awq-from-7.0 and 0009-w4a16-from-7.0."""
    vllm_python.run(ROOT / "tests" / "scripts" / "chosen_kernels.py", check)


@pytest.mark.parametrize("kv_cache", ["fp8", "fp8_e4m3"])
def test_e4m3_cache_is_refused_at_the_start_with_a_hint_to_e5m2(answers: Answers, kv_cache: str) -> None:
    """0010-kv-cache-dtype."""
    said = of(answers, "none, float16", "Llama", kv_cache)
    assert said["when"] == "start"
    assert re.fullmatch(
        r"A KV cache of \w+ needs compute capability 8\.9, .* --kv-cache-dtype fp8_e5m2, .*", said["refused"]
    )


def test_e5m2_cache_changes_no_selection(answers: Answers) -> None:
    """0010-kv-cache-dtype: upstream refuses it for every compressed-tensors checkpoint."""
    for (quantization, family, kv_cache, cards), choice in answers.items():
        if kv_cache == "fp8_e5m2":
            assert choice == of(answers, quantization, family, cards=cards), (quantization, family)
    assert not of(answers, "compressed-tensors W4A16", "Mixtral", "fp8_e5m2")["refused"]


def test_custom_all_reduce_needs_nvlink_or_the_option_and_is_logged(answers: Answers) -> None:
    """0011-all-reduce."""

    def said(cards: str) -> str:
        found: str = of(answers, "none, float16", "Llama", cards=cards)["all_reduce"]
        return found

    assert re.match(r"custom kernel\. .*NVLink joins all cards", said("2, NVLink"))
    assert re.match(
        r"NCCL\. .*7\.0 and NVLink does not join them all.* --no-disable-custom-all-reduce", said("2, PCIe")
    )
    forced = said("2, PCIe, --no-disable-custom-all-reduce")
    assert re.match(r"custom kernel\. .*--no-disable-custom-all-reduce forces it", forced)
    assert said("2, NVLink, --disable-custom-all-reduce") == "NCCL."
    assert said("4, NVLink").startswith("custom kernel.")
    assert said("4, PCIe").startswith("NCCL.")


@pytest.mark.parametrize(
    ("quantization", "family", "words"),
    [
        ("none, float16", "DeepSeek V2 (MLA)", "MLA.* VLLM_MLA_DISABLE=1"),
        ("none, float16", "Whisper", "cross attention.* decoder-only"),
        ("none, --dtype bfloat16", "Llama", "bfloat16.* --dtype auto"),
        ("compressed-tensors W8A8 int8", "Llama", "W8A8 int8.* 7.5.* GPTQ, AWQ"),
        ("compressed-tensors W8A8 int8", "Mixtral", "W8A8 int8.* 7.5.* GPTQ, AWQ"),
        ("compressed-tensors FP8", "Llama", "FP8.* GPTQ, AWQ"),
        ("FP8", "Qwen3 MoE", "FP8.* GPTQ, AWQ"),
        ("compressed-tensors W4A16, asymmetric", "Llama", "zero points.* GPTQ, AWQ"),
        ("compressed-tensors W4A16, per channel", "Mixtral", "experts per channel.* with groups"),
        ("compressed-tensors W4A16", "Gemma 2", "float32.* without quantization"),
        ("GPTQ 4 bit, act-order", "Mixtral", "experts in activation order.* without act-order"),
        ("GPTQ 4 bit, asymmetric", "Mixtral", "experts with zero points.* symmetric"),
        ("GPTQ 4 bit, per channel", "Mixtral", "experts with one group.* with groups"),
        ("AWQ, per channel", "Qwen3 MoE", "experts with one group.* with groups"),
    ],
)
def test_unsupported_models_are_refused_at_the_start_with_one_message(
    answers: Answers, quantization: str, family: str, words: str
) -> None:
    """0013-refusals."""
    said = of(answers, quantization, family)
    assert said["when"] == "start"
    assert re.search(words, said["refused"]), said["refused"]
    assert re.fullmatch(r"[^.]*(?:\.\d[^.]*)*\.", said["refused"]), "one sentence"


def test_compressed_tensors_act_order_needs_one_card_or_a_pipeline(answers: Answers) -> None:
    """0013-refusals: Exllama's kernel requires all inputs on one card."""

    def said(cards: str) -> Mapping[str, Any]:
        return of(answers, "compressed-tensors W4A16, act-order", "Llama", cards=cards)

    assert said("one")["linear"] == said("2 in a pipeline")["linear"] == "ExllamaLinearKernel"
    assert said("2, PCIe")["when"] == "start"
    assert re.search("activation order on several cards.* --pipeline-parallel-size", said("2, PCIe")["refused"])


def test_no_other_case_fails_while_layers_are_built(answers: Answers) -> None:
    late = {answer["refused"] for answer in answers.values() if answer["when"] == "building"}
    assert all("install bitsandbytes" in sentence for sentence in late), late
    assert not [answer for answer in answers.values() if answer["dtype"] == "bfloat16"]
    assert {answer["attention"] for answer in answers.values() if not answer["refused"]} == {"TRITON_ATTN"}


def stock(site_packages: Path, series: Path, folder: Path) -> Path:
    """Return a folder with the environment's vllm, without the patches that change the selection."""
    shutil.copytree(site_packages / "vllm", folder / "vllm")
    for patch in reversed(patches.series(series)):
        if int(patch.path.name[:4]) >= FIRST_CHOICE:
            parts = re.split(r"^(?=diff --git )", patch.path.read_text(), flags=re.MULTILINE)
            packaged = "".join(part for part in parts if part.startswith("diff --git a/vllm/"))
            undone = subprocess.run(
                ["patch", "-R", "-p1", "-F0", "-s"], input=packaged, cwd=folder, text=True, capture_output=True
            )
            assert undone.returncode == 0, f"{patch.path.name}: {undone.stdout}"
    return folder


def test_patches_do_not_change_the_selection_on_8_0(
    vllm_python: VllmPython, installed: Environment, repository: Path, tmp_path: Path
) -> None:
    """On 8.0 only the answers for an e4m3 cache differ, which Triton cannot compile below 8.9."""
    folder = stock(installed.site_packages, repository / "patches" / "vllm", tmp_path)

    def ask(before: Path | None) -> Answers:
        return read(vllm_python.run("-m", "volta.kernel_selection", "--capability", "8.0", before=before))

    with ThreadPoolExecutor() as both:
        with_ours, without = both.map(ask, (None, folder))
    differ = {case for case in without if with_ours[case] != without[case]}
    assert {kv_cache for _, _, kv_cache, _ in differ} == {"fp8", "fp8_e4m3"}
    assert all("needs compute capability 8.9" in with_ours[case]["refused"] for case in differ)


def test_documentation_has_these_tables(answers: Answers, tables: Path, repository: Path) -> None:
    """`python -m volta.kernel_selection --markdown` writes the tables; the text around them is written by hand."""
    assert answers
    assert tables.read_text() in (repository / "docs" / "volta.md").read_text()
