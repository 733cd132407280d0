"""Let vLLM answer the prompts, in a process of its own."""

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
"""Seconds for one start of vLLM with all its compiling."""


def arguments(folder: Path, variant: Variant, *, graphs: bool) -> dict[str, Any]:
    """vLLM's engine arguments for a variant's folder."""
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
    """Start vLLM in this process, and write what it answers, and how long a token takes, to a file."""
    from vllm import LLM, SamplingParams

    llm = LLM(**arguments(folder, variant, graphs=graphs))
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=BEST, ignore_eos=True, detokenize=False)
    asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts()]
    llm.generate(asked, greedy, use_tqdm=False)  # what is compiled at the first call is not timed
    begun = time.perf_counter()
    done = llm.generate(asked, greedy, use_tqdm=False)
    took = (time.perf_counter() - begun) * 1e6 / TOKENS
    answers = [
        asdict(
            Answer(
                list(one.prompt_token_ids),
                list(one.outputs[0].token_ids),
                [{token: found.logprob for token, found in step.items()} for step in one.outputs[0].logprobs],
            )
        )
        for one in done
    ]
    to.write_text(json.dumps({"microseconds": took, "answers": answers}))


def asked(folder: Path, variant: Variant, graphs: bool) -> tuple[list[Answer], float]:
    """What vLLM answers in a process of its own, and the microseconds that a step of all prompts takes.

    Raises:
        RuntimeError: it failed, in its own words.
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
        told = [one.strip() for one in (done.stdout + done.stderr).splitlines() if "Error" in one]
        raise RuntimeError(told[-1] if told else f"vLLM ended with status {done.returncode}")
    return read(to)


def read(path: Path) -> tuple[list[Answer], float]:
    """What :func:`generate` wrote."""
    said = json.loads(path.read_text())
    answers = [
        Answer(one["prompt"], one["tokens"], [{int(token): found for token, found in step.items()}
                                              for step in one["best"]])
        for one in said["answers"]
    ]  # fmt: skip
    return answers, said["microseconds"]
