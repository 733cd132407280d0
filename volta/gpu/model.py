"""A small Llama made on the spot, run by vLLM on this GPU and held against transformers on the CPU in float32.

`python -m volta.gpu.model` makes a folder for each variant (float16, with an fp8_e5m2 cache, GPTQ, AWQ), lets vLLM
answer some prompts greedily, with and without CUDA graphs, and prints rows as `volta.gpu.operations` does: is each
token the reference's own wherever that is decided, and how far are its logarithms of probabilities off? The exit status
is 0 if all is right, 1 if not, 5 if there is no card of compute capability 7.0. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from volta.gpu import operations
from volta.gpu.operations import NO_GPU, Row

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD, WORDS = 4, 512, 1024, 8, 2, 64, 1024
GROUP = 128
"""Inputs that share a scale, in a quantized matrix."""
PROMPTS = (1, 7, 33, 100)
"""How many tokens each prompt has: less than a tile of attention, and more than one."""
TOKENS, BEST = 16, 20
"""How many tokens are generated, and for how many candidates each time vLLM tells the logarithm of the probability."""
PATIENCE = 1800
"""Seconds for one start of vLLM with all its compiling."""
SEED = 70
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "vocab_size": WORDS,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float16",
}
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""The matrices of a layer, outputs x inputs."""
GAINS = {"self_attn": 0.8, "mlp": 1.2}
"""How much a matrix enlarges what it is given: attention as much as errors of an e5m2 cache allow, see VARIANTS."""

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A way to keep the weights and the cache."""

    name: str
    bound: float
    """How far a logarithm of a probability may be off."""
    quantization: str = ""
    """``gptq`` or ``awq``."""
    cache: str = "auto"


# The logits have a standard deviation of about 4.5. With transformers in float16 instead of vLLM, logarithms are off by
# 0.03 at most, and by 0.24 with an e5m2 cache: the reference rounds that too, but float16 and float32 may stand on two
# sides of a half, a quarter apart. The bounds are two to three times that. A cache that is not rounded is off by 0.7.
VARIANTS = (
    Variant("float16", 0.1),
    Variant("float16, fp8_e5m2 cache", 0.5, cache="fp8_e5m2"),
    Variant("GPTQ 4 bit", 0.1, "gptq"),
    Variant("AWQ 4 bit", 0.1, "awq"),
)


@dataclass(frozen=True)
class Answer:
    """What was generated after one prompt."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    best: Sequence[Mapping[int, float]]
    """For each token: candidates, the generated one among them, with the logarithm of their probability."""


# The folder -------------------------------------------------------------------------------------------------------


def weights(quantization: str = "", seed: int = SEED) -> tuple[Tensors, Tensors]:
    """The model twice: the tensors of a checkpoint, and the exact weights that they stand for, in float32."""
    import torch

    random = torch.Generator().manual_seed(seed)
    stored: Tensors = {}
    exact: Tensors = {}

    def normal(*shape: int, scale: float) -> Any:
        return torch.randn(shape, generator=random) * scale

    def plain(name: str, values: Any) -> None:
        stored[name] = values.half()
        exact[name] = values.half().float()

    plain("model.embed_tokens.weight", normal(WORDS, HIDDEN, scale=1))
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain(f"model.layers.{layer}.{norm}.weight", 1 + normal(HIDDEN, scale=0.1))
        for matrix, (outputs, inputs) in SHAPES.items():
            name = f"model.layers.{layer}.{matrix}"
            values = normal(outputs, inputs, scale=GAINS[matrix.split(".")[0]] / math.sqrt(inputs))
            if quantization:
                parts, kept = {"gptq": gptq, "awq": awq}[quantization](values.T)
                stored.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
                exact[f"{name}.weight"] = kept.T.contiguous()
            else:
                plain(f"{name}.weight", values)
    plain("model.norm.weight", 1 + normal(HIDDEN, scale=0.1))
    plain("lm_head.weight", normal(WORDS, HIDDEN, scale=0.2))
    return stored, exact


def gptq(values: Any) -> tuple[Tensors, Any]:
    """A matrix, inputs x outputs, as GPTQ keeps it: symmetric, in groups; and what that stands for.

    Eight numbers of a column lie in a word, the first one lowest. A zero point is stored less 1.
    """
    import torch

    inputs, outputs = values.shape
    scales = (_grouped(values).abs().amax(1) / 7.5).half()
    numbers = (values / _spread(scales)).round().add(8).clamp(0, 15).long()
    parts = {
        "qweight": packed(numbers.T.reshape(outputs, -1, 8), range(8)).T.contiguous(),
        "qzeros": torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32),
        "scales": scales,
        "g_idx": (torch.arange(inputs) // GROUP).int(),
    }
    return parts, (numbers - 8) * _spread(scales)


def awq(values: Any) -> tuple[Tensors, Any]:
    """A matrix, inputs x outputs, as AWQ keeps it: with zero points, in groups; and what that stands for.

    Eight numbers of a row lie in a word, in the order of :data:`volta.reference.AWQ_ORDER`.
    """
    from volta.reference import AWQ_ORDER

    inputs, outputs = values.shape
    low, high = _grouped(values).amin(1), _grouped(values).amax(1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15).long()
    less = zeros.repeat_interleave(GROUP, 0)
    numbers = ((values / _spread(scales)).round().long() + less).clamp(0, 15)
    parts = {
        "qweight": packed(numbers.reshape(inputs, -1, 8), AWQ_ORDER),
        "qzeros": packed(zeros.reshape(-1, outputs // 8, 8), AWQ_ORDER),
        "scales": scales,
    }
    return parts, (numbers - less) * _spread(scales)


def packed(numbers: Any, places: Sequence[int]) -> Any:
    """Words of 32 bits, each from the eight numbers of the last axis; ``places`` says which four bits each one gets."""
    import torch

    shifts = 4 * torch.tensor(list(places))
    words = (numbers << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _grouped(values: Any) -> Any:
    return values.reshape(-1, GROUP, values.shape[1])


def _spread(scales: Any) -> Any:
    return scales.float().repeat_interleave(GROUP, 0)


def quantization_config(quantization: str) -> dict[str, Any]:
    """What a checkpoint's config.json says of it."""
    if quantization == "gptq":
        said = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
        return {"quantization_config": {**said, "lm_head": False}}
    if quantization == "awq":
        return {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}}
    return {}


def write(folder: Path, variant: Variant) -> Tensors:
    """Put a variant's checkpoint into a folder; gives the exact weights."""
    from safetensors.torch import save_file

    stored, exact = weights(variant.quantization)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **quantization_config(variant.quantization)}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(stored, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return exact


def prompts(seed: int = SEED) -> list[list[int]]:
    """Token ids, of the lengths in :data:`PROMPTS`."""
    import torch

    random = torch.Generator().manual_seed(seed)
    return [torch.randint(2, WORDS, (count,), generator=random).tolist() for count in PROMPTS]


# The reference ----------------------------------------------------------------------------------------------------


class Reference:
    """transformers' own Llama on the CPU."""

    def __init__(self, exact: Tensors, variant: Variant, dtype: str = "float32") -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**{name: what for name, what in CONFIG.items() if name != "torch_dtype"})
        config._attn_implementation = "eager"
        self.variant = variant
        self.model = LlamaForCausalLM(config).eval()
        self.model.load_state_dict(exact)
        self.model.to(getattr(torch, dtype))

    def logarithms(self, tokens: Sequence[int]) -> Any:
        """The logarithms of the probabilities of what follows each token, ``[tokens, words]`` in float32."""
        import torch

        with torch.no_grad():
            made = self.model(torch.tensor([list(tokens)]), past_key_values=self._cache(), use_cache=True)
        return torch.log_softmax(made.logits[0].float(), -1)

    def greedy(self, prompt: Sequence[int]) -> Answer:
        """What this model generates itself."""
        tokens, best = list(prompt), []
        for _ in range(TOKENS):
            said, found = self.logarithms(tokens)[-1].topk(BEST)
            tokens.append(int(found[0]))
            best.append(dict(zip(found.tolist(), said.tolist(), strict=True)))
        return Answer(prompt, tokens[len(prompt) :], best)

    def _cache(self) -> Any:
        from transformers.cache_utils import DynamicCache

        from volta.reference import e5m2

        if self.variant.cache == "auto":
            return DynamicCache()

        class Rounded(DynamicCache):
            """A cache that keeps e5m2."""

            def update(self, keys: Any, values: Any, *more: Any, **others: Any) -> Any:
                short = [e5m2(one.half()).to(one.dtype) for one in (keys, values)]
                return super().update(*short, *more, **others)

        return Rounded()


# The comparison ---------------------------------------------------------------------------------------------------


def compare(name: str, answers: Sequence[Answer], reference: Reference, took: float | None = None) -> list[Row]:
    """Two rows: whether tokens are the reference's wherever it decides, and how far logarithms are off.

    The reference is given the very tokens that were generated, so that one that it leaves open does not lead the two
    apart. Its choice is decided where its best token is ahead of the next by more than twice the bound: then no two
    errors within the bound can turn it round.
    """
    bound = reference.variant.bound
    worst, asked, decided, other = 0.0, 0, 0, 0
    for answer in answers:
        right = reference.logarithms([*answer.prompt, *answer.tokens])[len(answer.prompt) - 1 :]
        for token, best, here in zip(answer.tokens, answer.best, right, strict=False):
            for candidate, said in best.items():
                off = abs(said - float(here[candidate]))
                worst = max(worst, math.inf if math.isnan(off) else off)
                asked += 1
            (first, second), (choice, _) = (found.tolist() for found in here.topk(2))
            if first - second > 2 * bound:
                decided += 1
                other += token != choice
    count = sum(len(answer.tokens) for answer in answers)
    whole = count == TOKENS * len(PROMPTS) and asked >= count and 4 * decided >= count
    said = f"{decided} of {count} tokens are decided by more than {2 * bound}, {other} of these are others"
    tokens = Row(
        f"{name}: tokens", float(other), 0.0, took, "right" if whole and not other else "wrong",
        said if whole else f"{said}: too few to say anything"
    )  # fmt: skip
    why = f"the largest of {asked} logarithms' differences"
    return [tokens, Row(f"{name}: logarithms", worst, bound, took, "right" if worst <= bound else "wrong", why)]


# vLLM -------------------------------------------------------------------------------------------------------------


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
        done = subprocess.run([sys.executable, "-m", "volta.gpu.model", *words], env=environ, capture_output=True,
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


# Driving it -------------------------------------------------------------------------------------------------------


def rows(variant: Variant, folder: Path, device: str) -> Iterator[Row]:
    """All rows of a variant: vLLM's with and without CUDA graphs, or on the CPU those of transformers in float16."""
    exact = write(folder, variant)
    reference = Reference(exact, variant)
    runs: dict[str, Callable[[], tuple[list[Answer], float | None]]] = {
        "eager": lambda: asked(folder, variant, graphs=False),
        "CUDA graphs": lambda: asked(folder, variant, graphs=True),
    }
    if device == "cpu":
        short = Reference(exact, variant, "float16")
        runs = {"transformers in float16": lambda: ([short.greedy(prompt) for prompt in prompts()], None)}
    for how, ask in runs.items():
        name = f"{variant.name}, {how}"
        try:
            answers, took = ask()
        except RuntimeError as problem:
            yield Row(name, bound=variant.bound, said=str(problem)[:300])
            continue
        yield from compare(name, answers, reference, took)


def line(row: Row) -> str:
    """A row for people; here what is said of a right one is worth reading too."""
    return f"{operations.line(row)}: {row.said}" if row.verdict == "right" else operations.line(row)


def absent(any_card: bool) -> str:
    """Why there is no card to run it on, in a sentence; empty where there is one."""
    if why := operations.absent():
        return why
    import torch

    found = torch.cuda.get_device_capability()
    if found != (7, 0) and not any_card:
        return (
            f"This machine's card is of compute capability {found[0]}.{found[1]} and the wheel is for 7.0 alone: "
            "--any-card tries all the same, with a vLLM that has code for this card."
        )
    return ""


def main(words: Sequence[str] | None = None) -> int:
    """Run all variants."""
    parser = argparse.ArgumentParser(prog="volta.gpu.model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--any-card", action="store_true", help="not only on 7.0: needs a vLLM with code for this card")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"),
                        help="cpu: transformers in float16 stands in for vLLM, to try the comparison")  # fmt: skip
    parser.add_argument("--only", default="", metavar="WORDS", help="only variants that have these words in the name")
    parser.add_argument("--json", action="store_true", help="one JSON value a line: what it runs on, then each row")
    for inner in ("--generate", "--to"):
        parser.add_argument(inner, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--graphs", action="store_true", help=argparse.SUPPRESS)
    said = parser.parse_args(words)
    if said.generate:
        generate(said.generate, next(one for one in VARIANTS if one.name == said.variant), said.graphs, said.to)
        return 0
    if said.device == "cuda" and (why := absent(said.any_card)):
        print(why, file=sys.stderr)
        return NO_GPU
    wanted = [one for one in VARIANTS if said.only in one.name]
    if not wanted:
        parser.error(f"no variant has {said.only} in its name")
    about = operations.machine(said.device)
    print(json.dumps(about) if said.json else ", ".join(f"{name} {what}" for name, what in about.items()), flush=True)
    fine = True
    with tempfile.TemporaryDirectory(prefix="volta-model-") as folder:
        for number, variant in enumerate(wanted):
            for row in rows(variant, Path(folder) / str(number), said.device):
                print(json.dumps(asdict(row)) if said.json else line(row), flush=True)
                fine = fine and row.fine
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
