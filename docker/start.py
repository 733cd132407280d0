"""The entry point of the image: check the driver and the GPUs, then run ``vllm serve``.

    docker run --gpus all -p 8000:8000 IMAGE --model Qwen/Qwen2.5-7B-Instruct --dtype half

The arguments are those of ``vllm serve``. If the first one is a command, such as ``vllm``, ``python`` or ``sh``, it is
executed instead. VOLTFORGE_ANY_GPU=1 allows any card.
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
"""Out-of-memory messages of PyTorch 2.9.0 and of vLLM 0.12.0 (v1/core/kv_cache_utils.py, v1/worker/gpu_worker.py)."""


def main(words):
    """Serve, or execute the given command, and return the exit status."""
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
    """Print a sentence on standard error and return the exit status 1."""
    print(f"voltforge: {problem}", file=sys.stderr, flush=True)
    return 1


def refusal(environ):
    """Return one sentence with the reason why this machine cannot serve, or an empty string."""
    nvml = library()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return (
            "this container has no NVIDIA driver; start it with --gpus all, on a host that has the driver "
            "and the NVIDIA Container Toolkit"
        )
    try:
        driver = text(nvml.nvmlSystemGetDriverVersion())
        if int(driver.split(".")[0]) < OLDEST_DRIVER:
            return f"the NVIDIA driver is {driver}; this image needs {OLDEST_DRIVER} or newer, for CUDA 12"
        count = nvml.nvmlDeviceGetCount()
        if not count:
            return "the NVIDIA driver shows no GPU; start the container with --gpus all"
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
                    f"GPU {number} ({card}) has compute capability {has}, but this image has code only for {wanted}; "
                    "choose other cards with --gpus, or use an image for this card"
                )
    finally:
        nvml.nvmlShutdown()
    return ""


def library():
    """Return vLLM's copy of the NVML binding. It is loaded by its path, because importing vLLM takes seconds."""
    path = next(ENVIRONMENT.glob("lib/python3*/site-packages/vllm/third_party/pynvml.py"))
    spec = importlib.util.spec_from_file_location("pynvml", path)
    module = sys.modules["pynvml"] = importlib.util.module_from_spec(spec)  # the module looks itself up there
    spec.loader.exec_module(module)
    return module


def text(value):
    """Return a string of NVML, which older bindings return as bytes."""
    return value.decode() if isinstance(value, bytes) else value


def bring_cache():
    """Copy the precompiled kernels of the image to Triton's cache.

    Without them the server compiles what it needs. Therefore no error here stops the start.
    """
    target = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton"))
    try:
        target.mkdir(parents=True, exist_ok=True)
        for left in target.glob(".bringing-*"):  # left by a killed start, unless another server is copying
            if time.time() - left.stat().st_mtime > 600:
                shutil.rmtree(left, ignore_errors=True)
        for entry in (HERE / "triton-cache").iterdir():
            if not (target / entry.name).exists():
                bring(entry, target / entry.name)
    except Exception as error:
        why = getattr(error, "strerror", None) or error
        print(f"voltforge: the Triton cache {target} cannot be filled: {why}", file=sys.stderr, flush=True)


def bring(entry, place):
    """Copy one kernel completely or not at all; another server may have copied it first."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".bringing-") as beside:
        made = Path(beside, entry.name)
        shutil.copytree(entry, made)
        for group in made.glob("__grp__*.json"):  # Triton finds the files of a kernel by absolute paths
            names = [Path(path).name for path in json.loads(group.read_text())["child_paths"].values()]
            group.write_text(json.dumps({"child_paths": {name: str(place / name) for name in names}}))
        try:
            made.rename(place)
        except OSError:
            if not place.is_dir():
                raise


def serve(words):
    """Run the server, forward signals to it, and explain its failure if the model was too large."""
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
            "--max-num-seqs, use a quantized model (GPTQ), or split it with --tensor-parallel-size 2"
        )
    return status if status >= 0 else 128 - status


def is_healthy():
    """Return 0 if the server answers and 1 if not: the exit status of a health check."""
    try:
        with urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=8) as answer:
            return 0 if answer.status == 200 else 1
    except OSError:
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
