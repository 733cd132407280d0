"""The small Llama of `volta.small_model`: vLLM loads its checkpoints, and the comparison finds faults."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.vllm_python import VllmPython, Workbench
from volta.torch_operations.operation import NO_GPU, OperationResult

pytestmark = [pytest.mark.slow, pytest.mark.build]

PROGRAM = ("-m", "volta.small_model")
LOADED = """
import contextlib, json, sys, tempfile
from pathlib import Path
from volta import reference
from volta.kernel_selection import startup
startup.pretended((7, 0))
startup.quiet()
import torch
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization.utils.quant_utils import pack_rows
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype
from volta.small_model import checkpoint, generation

def loaded(variant, graphs, folder):
    exact = checkpoint.write(folder, variant)
    config = EngineArgs(**generation.arguments(folder, variant, graphs=graphs)).create_engine_config()
    if not torch.distributed.is_initialized():
        startup.joined(config, 0, folder)
    with set_current_vllm_config(config), set_default_torch_dtype(torch.float16), torch.device("cpu"):
        made = initialize_model(vllm_config=config)
        get_model_loader(config.load_config).load_weights(made, config.model_config)
    return exact, config, made.model.layers[1].mlp.down_proj

said = {}
with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as name:
    for number, variant in enumerate(checkpoint.VARIANTS):
        for graphs in (False, True):
            exact, config, layer = loaded(variant, graphs, Path(name) / f"{number}-{graphs}")
        stored = load_file(Path(name) / f"{number}-True" / "model.safetensors")
        right = exact["model.layers.1.mlp.down_proj.weight"].T.double()
        if variant.quantization == "awq":
            same = torch.equal(reference.awq_weights(layer.qweight, layer.scales, layer.qzeros), right)
        elif variant.quantization == "gptq":
            numbers = (right / layer.scales.double().repeat_interleave(checkpoint.GROUP, 0)).round().int() + 8
            same = torch.equal(pack_rows(numbers, 4, *numbers.shape), layer.qweight)
        else:
            same = torch.equal(layer.weight.T.double(), right)
        there = all(torch.equal(one.data, stored[f"model.layers.1.mlp.down_proj.{part}"])
                    for part, one in layer.named_parameters())
        method = type(layer.quant_method).__name__
        said[variant.name] = [method, config.cache_config.cache_dtype, there, same]
print(json.dumps(said))
"""
SPOILT = """
import json
from dataclasses import replace
from volta.small_model import checkpoint
from volta.small_model.comparison import compare
from volta.small_model.reference import Reference

variant = next(one for one in checkpoint.VARIANTS if one.name == {variant!r})
exact = checkpoint.weights(variant.quantization)[1]
reference = Reference(exact, variant)

def spoilt():
    used, asked, maker = dict(exact), checkpoint.prompts(), variant
    {spoil}
    made = Reference(used, maker)
    return [made.greedy(prompt) for prompt in asked]

answers = spoilt()
checkpoint.CONFIG["rope_theta"] = 10000.0
{after}
print(json.dumps([row.verdict for row in compare("it", answers, reference)]))
"""
KEYS, DOWN = "model.layers.2.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"
OTHER = "next(token for token in one.best[-1] if token != one.tokens[-1])"
WRONGS = {
    "nothing": ("float16", "", "", "right", "right"),
    "two heads of keys are swapped": (
        "float16", f"used['{KEYS}'] = used['{KEYS}'].roll(checkpoint.HEAD, 0)", "", None, "wrong",
    ),
    "one group of inputs of one matrix has half its scale": (
        "float16", f"used['{DOWN}'] = used['{DOWN}'].clone(); used['{DOWN}'][:, :128] *= 0.5", "", None, "wrong",
    ),
    "the angles of positions have another base": (
        "float16", "checkpoint.CONFIG['rope_theta'] = 9000.0", "", None, "wrong",
    ),
    "a cache keeps more than e5m2": (
        "float16, fp8_e5m2 cache", "maker = checkpoint.VARIANTS[0]", "", None, "wrong",
    ),
    "a decided token is another": (
        "float16", "", f"answers = [replace(one, tokens=[*one.tokens[:-1], {OTHER}]) for one in answers]",
        "wrong", "right",
    ),
    "there are too few tokens": ("float16", "asked = asked[:1]", "", "wrong", "right"),
}  # fmt: skip
GLUE = """
import json, tempfile
from pathlib import Path
import vllm
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from volta.small_model import checkpoint, generation
from volta.small_model.comparison import compare
from volta.small_model.reference import BEST, TOKENS, Reference

variant = checkpoint.VARIANTS[0]
short = Reference(checkpoint.weights()[1], variant, "float16")

class Llm:
    def __init__(self, **arguments):
        assert arguments["model"] and arguments["enforce_eager"]

    def generate(self, requests, sampling, use_tqdm):
        assert (sampling.temperature, sampling.max_tokens, sampling.logprobs) == (0, TOKENS, BEST)
        for number, one in enumerate(requests):
            said = short.greedy(one["prompt_token_ids"])
            best = [{token: Logprob(found) for token, found in step.items()} for step in said.best]
            done = CompletionOutput(0, "", said.tokens, 0.0, best)
            yield RequestOutput(str(number), None, said.prompt, None, [done], True)

vllm.LLM = Llm
with tempfile.TemporaryDirectory() as name:
    generation.generate(Path(name), variant, False, Path(name) / "answers.json")
    answers, took = generation.read(Path(name) / "answers.json")
reference = Reference(checkpoint.weights()[1], variant)
print(json.dumps([vars(row) for row in compare("it", answers, reference, took)]))
"""


BROKEN = """
import json, tempfile
from pathlib import Path
import volta.small_model.__main__ as program
from volta.small_model import checkpoint

def broken(*_, **__):
    raise RuntimeError("the card has no memory left")

program.run_vllm = broken
with tempfile.TemporaryDirectory() as name:
    rows = [vars(row) for row in program.rows(checkpoint.VARIANTS[0], Path(name) / "model", "cuda")]
print(json.dumps(rows))
"""


def last(lines: str) -> Any:
    return json.loads(lines.splitlines()[-1])


def test_vllm_on_a_pretended_volta_loads_the_reference_weights_of_each_variant(
    vllm_python: VllmPython,
) -> None:
    assert last(vllm_python.run("-c", LOADED)) == {
        "float16": ["UnquantizedLinearMethod", "auto", True, True],
        "float16, fp8_e5m2 cache": ["UnquantizedLinearMethod", "fp8_e5m2", True, True],
        "GPTQ 4 bit": ["GPTQLinearMethod", "auto", True, True],
        "AWQ 4 bit": ["AWQLinearMethod", "auto", True, True],
    }


def test_transformers_in_float16_are_within_half_of_every_bound(vllm_python: VllmPython) -> None:
    about, *rows = map(json.loads, vllm_python.run(*PROGRAM, "--device", "cpu", "--json").splitlines())
    assert about["device"] == "CPU"
    assert len(rows) == 8
    for row in (OperationResult(**one) for one in rows):
        assert row.verdict == "right", row
        assert row.error is not None
        assert row.bound is not None
        assert row.error <= row.bound / 2
        assert row.error or "tokens" in row.operation


@pytest.fixture(scope="module")
def bench(vllm_python: VllmPython) -> Iterator[Workbench]:
    """A process that runs models with faults."""
    made = Workbench(vllm_python)
    yield made
    made.end()


@pytest.mark.parametrize("wrong", WRONGS)
def test_wrong_model_is_found(bench: Workbench, wrong: str) -> None:
    variant, spoil, after, tokens, logarithms = WRONGS[wrong]
    found = last(bench.does(SPOILT.format(variant=variant, spoil=spoil, after=after)))
    assert found[1] == logarithms
    assert tokens in {None, found[0]}


def test_answers_of_vllm_are_written_read_and_compared(vllm_python: VllmPython) -> None:
    """vllm.LLM needs a GPU; a replacement returns vLLM's own output types."""
    tokens, logarithms = (OperationResult(**one) for one in last(vllm_python.run("-c", GLUE)))
    assert (tokens.verdict, logarithms.verdict) == ("right", "right")
    assert tokens.microseconds
    assert "64 tokens" in tokens.reason


def test_vllm_that_fails_gives_a_row_with_the_reason(vllm_python: VllmPython) -> None:
    rows = [OperationResult(**row) for row in last(vllm_python.run("-c", BROKEN))]
    assert [row.verdict for row in rows] == ["failed", "failed"]
    assert {row.reason for row in rows} == {"the card has no memory left"}


def test_missing_gpu_gives_a_message_and_status_5(vllm_python: VllmPython) -> None:
    done = subprocess.run([vllm_python.python, *PROGRAM], env=dict(vllm_python.environ), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (NO_GPU, "")
    assert "finds no GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1
