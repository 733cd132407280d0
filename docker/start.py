"""What the image starts: looks whether this machine can serve, says in a sentence if not, and runs ``vllm serve``.

    docker run --gpus all -p 8000:8000 IMAGE --model Qwen/Qwen2.5-7B-Instruct --dtype half

Words that begin with a dash, or name a model, are those of ``vllm serve``; ``vllm …``, ``python …`` and ``sh`` are run
as they are. With VOLTFORGE_ANY_GPU=1 no card is refused.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = Path("/opt/vllm")
OLDEST_DRIVER = 535
"""The first branch of NVIDIA's driver that runs CUDA 12.2 and, by minor-version compatibility, all of CUDA 12."""
CAPABILITY = (7, 0)
COMMANDS = ("vllm", "python", "python3", "sh", "bash", "env")
TOO_LARGE = re.compile(
    r"CUDA out of memory|No available memory for the cache blocks|is larger than the available KV cache memory"
    r"|larger than the maximum number of tokens that can be stored in KV cache|Free memory on device .* is less than"
)
"""How PyTorch 2.9.0 and vLLM 0.12.0 (v1/core/kv_cache_utils.py, v1/worker/gpu_worker.py) say that there is no room."""


def main(words):
    """Run what the words ask for; gives the exit status."""
    if words == ["--is-healthy"]:
        return is_healthy()
    if words and words[0] in COMMANDS:
        os.execvp(words[0], words)
    if words == ["--version"]:
        print(importlib.metadata.version("vllm"))
        return 0
    if problem := refusal(os.environ):
        if {"-h", "--help"}.intersection(words):
            print(__doc__)
        return say(problem)
    bring_cache()
    return serve([str(ENVIRONMENT / "bin/vllm"), "serve", *words])


def say(problem):
    """One sentence on standard error."""
    print(f"voltforge: {problem}", file=sys.stderr, flush=True)
    return 1


def refusal(environ):
    """Why this machine cannot serve, in a sentence, or nothing."""
    nvml = library()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return (
            "no NVIDIA driver is to be seen in this container; start it with --gpus all, on a host that has the driver "
            "and the NVIDIA container toolkit"
        )
    try:
        driver = text(nvml.nvmlSystemGetDriverVersion())
        if int(driver.split(".")[0]) < OLDEST_DRIVER:
            return f"the NVIDIA driver is {driver}; this image needs {OLDEST_DRIVER} or newer, for CUDA 12"
        count = nvml.nvmlDeviceGetCount()
        if not count:
            return "the NVIDIA driver is here and shows no GPU; start the container with --gpus all"
        for number in range(count):
            card = nvml.nvmlDeviceGetHandleByIndex(number)
            found = tuple(nvml.nvmlDeviceGetCudaComputeCapability(card))
            if found != CAPABILITY and environ.get("VOLTFORGE_ANY_GPU") != "1":
                card, has, wanted = (
                    text(nvml.nvmlDeviceGetName(card)),
                    "{}.{}".format(*found),
                    "{}.{}".format(*CAPABILITY),
                )
                return (
                    f"GPU {number} ({card}) has compute capability {has}, and this image has device code for {wanted} "
                    "alone; pick other cards with --gpus, or use an image made for it"
                )
    finally:
        nvml.nvmlShutdown()
    return ""


def library():
    """NVML's binding that vLLM brings; loaded by its path, for all of vLLM takes seconds."""
    path = next(ENVIRONMENT.glob("lib/python3*/site-packages/vllm/third_party/pynvml.py"))
    spec = importlib.util.spec_from_file_location("pynvml", path)
    module = sys.modules["pynvml"] = importlib.util.module_from_spec(spec)  # it looks itself up there
    spec.loader.exec_module(module)
    return module


def text(value):
    """NVML's strings, which older bindings give as bytes."""
    return value.decode() if isinstance(value, bytes) else value


def bring_cache():
    """Copy the kernels that were compiled ahead of time, if the image has any, to where Triton looks for them.

    Without them the server compiles what it needs: nothing that goes wrong here may keep it from starting.
    """
    target = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton"))
    try:
        target.mkdir(parents=True, exist_ok=True)
        for left in target.glob(".bringing-*"):  # by a start that was ended, unless another server is at it now
            if time.time() - left.stat().st_mtime > 600:
                shutil.rmtree(left, ignore_errors=True)
        for entry in (HERE / "triton-cache").iterdir():
            if not (target / entry.name).exists():
                bring(entry, target / entry.name)
    except Exception as error:
        why = getattr(error, "strerror", None) or error
        print(f"voltforge: the Triton cache {target} cannot be filled: {why}", file=sys.stderr, flush=True)


def bring(entry, place):
    """Copy one kernel to its place, which has all of it or nothing; another server may be quicker."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".bringing-") as beside:
        made = Path(beside, entry.name)
        shutil.copytree(entry, made)
        for group in made.glob("__grp__*.json"):  # Triton finds the files of a kernel by their whole paths
            names = [Path(path).name for path in json.loads(group.read_text())["child_paths"].values()]
            group.write_text(json.dumps({"child_paths": {name: str(place / name) for name in names}}))
        try:
            made.rename(place)
        except OSError:
            if not place.is_dir():
                raise


def serve(words):
    """Run the server to its end, hand signals on, and say at the end if the model was too large."""
    child = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, errors="replace")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: child.send_signal(number))
    reason = ""
    for line in child.stderr:
        sys.stderr.write(line)
        sys.stderr.flush()
        if match := TOO_LARGE.search(line):
            reason = match[0]
    status = child.wait()
    if status and reason:
        say(
            f"the model does not fit into the GPU's memory ({reason}); lower --max-model-len or "
            "--max-num-seqs, take a quantized model (GPTQ), or split it with --tensor-parallel-size 2"
        )
    return status if status >= 0 else 128 - status


def is_healthy():
    """Whether the server answers; the exit status that a health check wants."""
    try:
        with urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=8) as answer:
            return 0 if answer.status == 200 else 1
    except OSError:
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
