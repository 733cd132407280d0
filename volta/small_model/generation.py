"""Run vLLM on the prompts, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from volta.small_model.checkpoint import Variant, prompts
from volta.small_model.reference import BEST, TOKENS, Answer

PATIENCE = 1800
"""Seconds for one start of vLLM, including its compilations."""


def arguments(folder: Path, variant: Variant, *, graphs: bool) -> dict[str, Any]:
    """Return vLLM's engine arguments for a variant's folder."""
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "safetensors",
        "dtype": "float16",
        "kv_cache_dtype": variant.cache,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_logprobs": BEST,
        "gpu_memory_utilization": 0.5,
        "enable_prefix_caching": False,
        "enforce_eager": not graphs,
        "seed": 0,
    }


def generate(folder: Path, variant: Variant, graphs: bool, to: Path) -> None:
    """Start vLLM in this process; write its answers and the time of a step to a file."""
    from vllm import LLM, SamplingParams

    llm = LLM(**arguments(folder, variant, graphs=graphs))
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=BEST, ignore_eos=True, detokenize=False)
    requests: Any = [{"prompt_token_ids": prompt} for prompt in prompts()]
    llm.generate(requests, greedy, use_tqdm=False)  # compiles; not timed
    begun = time.perf_counter()
    outputs = llm.generate(requests, greedy, use_tqdm=False)
    took = (time.perf_counter() - begun) * 1e6 / TOKENS
    answers = [
        asdict(
            Answer(
                list(output.prompt_token_ids),
                list(output.outputs[0].token_ids),
                [
                    {token: candidate.logprob for token, candidate in step.items()}
                    for step in output.outputs[0].logprobs
                ],
            )
        )
        for output in outputs
    ]
    to.write_text(json.dumps({"microseconds": took, "answers": answers}))


def run_vllm(folder: Path, variant: Variant, graphs: bool) -> tuple[list[Answer], float]:
    """Run vLLM in a process; return its answers and the microseconds of one step of all prompts.

    Raises:
        RuntimeError: vLLM failed; the text is its last error.
    """
    to = folder / f"answers-{'graphs' if graphs else 'eager'}.json"
    words = ["--generate", str(folder), "--variant", variant.name, "--to", str(to), *(["--graphs"] if graphs else [])]
    environ = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    try:
        done = subprocess.run([sys.executable, "-m", "volta.small_model", *words], env=environ, capture_output=True,
                              text=True, errors="replace", timeout=PATIENCE)  # fmt: skip
    except subprocess.TimeoutExpired as problem:
        raise RuntimeError(f"vLLM took longer than {PATIENCE} s") from problem
    if done.returncode or not to.is_file():
        errors = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "Error" in line]
        raise RuntimeError(errors[-1] if errors else f"vLLM exited with status {done.returncode}")
    return read(to)


def read(path: Path) -> tuple[list[Answer], float]:
    """Read the file that :func:`generate` wrote."""
    content = json.loads(path.read_text())
    answers = [
        Answer(answer["prompt"], answer["tokens"], [{int(token): logprob for token, logprob in step.items()}
                                              for step in answer["best"]])
        for answer in content["answers"]
    ]  # fmt: skip
    return answers, content["microseconds"]
