"""The image is built from the wheels of the wheelhouse."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkouts import doit
from voltforge.compile.driver_stub import DriverStub
from voltforge.image import container_engine
from voltforge.image.container_engine import EngineError
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import distro, environment


@pytest.fixture(scope="module")
def results(repository: Path, vllm: Pipeline, engine_works: None) -> dict:
    """The output of `./doit image`: ten minutes on two cores, nothing if it is current."""
    doit("image")
    return json.loads((repository / "build/stages/image.json").read_text())["results"]


@pytest.fixture(scope="module")
def container(results: dict) -> Iterator[str]:
    """A container of the image."""
    name = subprocess.run(
        ["buildah", "from", results["name"]], capture_output=True, text=True, check=True
    ).stdout.strip()
    yield name
    subprocess.run(["buildah", "rm", name], check=True, capture_output=True)


def inside(container: str, *words: str, options: tuple[str, ...] = (), status: int = 0) -> str:
    command = ["buildah", "run", "--isolation", "chroot", *options, container, "--", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


WITHOUT_A_GPU = ("env", "LD_LIBRARY_PATH=/mnt/driver", "PYTHONPATH=/mnt")


def without_a_gpu(repository: Path, driver_stub: DriverStub) -> dict[Path, str]:
    """The mounts that simulate a GPU."""
    return {repository / "volta": "volta", driver_stub.path: "driver"}


def mounted(places: dict[Path, str]) -> tuple[str, ...]:
    return tuple(word for real, name in places.items() for word in ("--volume", f"{real}:/mnt/{name}:ro"))


@pytest.mark.build
def test_image_is_small_and_a_vllm_update_changes_few_layers(results: dict) -> None:
    layers = [size for _, size in results["compressed"]]
    assert results["base_size"] + sum(results["layers"].values()) <= 6_500_000_000
    assert sum(layers) <= 3_200_000_000
    assert sum(layers[-3:]) < 100_000_000, "vllm's own layer, its kernels and the configuration are the last"
    assert 0 < results["layers"]["kernels"] <= 20_000_000, (
        "what is compiled ahead for the shapes in volta/triton_kernels/model_shapes.py"
    )
    assert layers[-2] <= 1_000_000


@pytest.mark.build
def test_archive_has_labels_and_the_run_configuration(results: dict, repository: Path) -> None:
    told = subprocess.run(
        ["skopeo", "inspect", "--config", f"oci-archive:{repository / results['path']}"],
        capture_output=True,
        text=True,
        check=True,
    )
    config = json.loads(told.stdout)["config"]
    for project in ("torch", "vllm"):
        receipt = json.loads(
            (repository / f"wheelhouse/receipts/{project}-{environment.python_tag()}.json").read_text()
        )
        assert config["Labels"][f"voltforge.{project}.receipt"] == receipt["key"]
        assert config["Labels"][f"voltforge.{project}.sha256"] == receipt["results"]["sha256"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["/opt/vllm/bin/python", "/opt/voltforge/start.py"]
    assert {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"} <= set(config["Env"])
    assert set(config["Volumes"]) == {"/home/vllm/.cache", "/home/vllm/.triton"}
    assert config["StopSignal"] == "SIGTERM"


@pytest.mark.build
def test_packages_of_the_image_import_and_are_compatible(container: str, repository: Path) -> None:
    assert Path("/opt/vllm/bin/vllm").name in inside(container, "sh", "-c", "command -v vllm")
    program = "import torch, torchvision, transformers, vllm, triton; print(torch._C._cuda_getArchFlags())"
    assert inside(container, "python", "-c", program).split()[-1] == "sm_70"
    pip = next((repository / ".venv/lib").glob("python3*/site-packages/pip"))
    said = inside(container, "python", "/mnt/pip", "check", options=("--volume", f"{pip}:/mnt/pip:ro"))
    assert "No broken requirements found." in said


@pytest.mark.build
def test_vllms_command_line_runs_on_a_pretended_volta(
    container: str, repository: Path, driver_stub: DriverStub
) -> None:
    options = mounted({repository / "tests/scripts": "scripts", **without_a_gpu(repository, driver_stub)})
    pretended = (*WITHOUT_A_GPU, "python", "/mnt/scripts/pretended_volta.py")
    version = inside(container, *pretended, "the_command_line_says_its_version", options=options)
    assert "0.12.0+sm70" in version
    assert "usage: vllm serve" in inside(container, *pretended, "the_command_line_explains_itself", options=options)


TRITON = """
import tempfile, torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.build import _build
open("/tmp/kernel.py", "w").write('''
import triton, triton.language as tl
@triton.jit
def add(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)
''')
import sys; sys.path.insert(0, "/tmp"); from kernel import add
signature = {"x": "*fp16", "y": "*fp16", "n": "i32", "BLOCK": "constexpr"}
made = triton.compile(ASTSource(add, signature, {"BLOCK": 128}), target=GPUTarget("cuda", 70, 32))
assert ".target sm_70" in made.asm["ptx"] and made.asm["cubin"]
with tempfile.TemporaryDirectory() as folder:
    source = folder + "/module.c"
    open(source, "w").write("#include <Python.h>\\nPyMODINIT_FUNC PyInit_one(void) { return 0; }")
    print("launcher", _build("one", source, folder, [], [], [], []).endswith(".so"))
print("inductor", torch.compile(lambda x: (x * 2).sin())(torch.ones(8)).shape[0])
"""


@pytest.mark.build
def test_triton_and_inductor_compile_with_the_images_own_compiler(container: str) -> None:
    said = inside(container, "python", "-c", TRITON)
    assert "launcher True" in said
    assert "inductor 8" in said


FOUND = (
    "python -c 'import start; start.bring_cache()' && "
    "exec python -m volta.triton_kernels.precompile --check --cache $TRITON_CACHE_DIR"
)


@pytest.mark.build
def test_triton_in_the_image_finds_every_precompiled_kernel(
    container: str, repository: Path, driver_stub: DriverStub
) -> None:
    """vLLM's own calls on a simulated card, with compilers that refuse to run."""
    options = mounted(without_a_gpu(repository, driver_stub))
    said = inside(container, *WITHOUT_A_GPU, "PYTHONPATH=/mnt:/opt/voltforge", "sh", "-c", FOUND, options=options)
    found = re.search(r"(\d+) kernels, all in the cache", said)
    assert found
    assert int(found[1]) > 300


@pytest.mark.build
def test_image_runs_as_an_unprivileged_user(container: str) -> None:
    said = inside(container, "sh", "-c", "id -u; touch /opt/vllm/x 2>/dev/null || echo refused")
    assert said.split() == ["1000", "refused"]


@pytest.mark.build
def test_image_contains_no_path_of_the_build_machine(container: str, repository: Path) -> None:
    told = subprocess.run(["buildah", "mount", container], capture_output=True, text=True, check=True)
    root = Path(told.stdout.strip())
    folders = [root / name for name in ("opt", "etc", "home", "var")]
    words = ["grep", "-rlF", "--exclude=*.so*", str(repository), *folders]
    assert subprocess.run(words, capture_output=True, text=True, check=False).stdout == ""
    assert not (root / "etc/apt/sources.list").exists()


@pytest.mark.build
def test_missing_gpu_is_reported_in_a_sentence(container: str) -> None:
    start = ("/opt/vllm/bin/python", "/opt/voltforge/start.py")
    said = inside(container, *start, "--model", "some/model", status=1)
    [line] = [line for line in said.splitlines() if line.startswith("voltforge: ")]
    assert "this container has no NVIDIA driver" in line
    assert "Traceback" not in said
    assert inside(container, *start, "--version").startswith("0.12.0+sm70")
    assert "docker run --gpus all" in inside(container, *start, "--help", status=1)


@pytest.mark.build
def test_base_with_another_python_is_refused(results: dict, repository: Path, tmp_path: Path) -> None:
    base = f"localhost/voltforge-base:{distro.codename()}"
    with pytest.raises(EngineError, match=r"the base has Python 3\.\d+, and the wheels are for 3\.99"):
        container_engine.choose().build(
            repository / "docker/Dockerfile",
            tmp_path,
            "localhost/voltforge-test:python",
            {"BASE": base, "PYTHON": "3.99"},
            {},
        )


@pytest.mark.build
def test_why_prints_layers_projects_and_omitted_files(results: dict, repository: Path) -> None:
    said = doit("image:why")
    for word in ("nvidia-cudnn-cu12", "packages", "required by", "back end"):
        assert word in said
