"""What goes into the image, in which layer, what is left out: of small wheels, and of the real ones."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkouts import doit
from tests.support.samples import compiled, wheel
from voltforge.compile.driver_stub import DriverStub
from voltforge.errors import VoltforgeError
from voltforge.image import container_engine, layers
from voltforge.image.container_engine import EngineError
from voltforge.image.layers import ImageError, LeaveOut, lay_out, reachable
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources import distro, environment
from voltforge.sources.environment import Environment
from voltforge.sources.index import Indexes

SCRIPTS = "[console_scripts]\nquick = quick:main\ngone = quick:gone\n"


@pytest.fixture
def settled(tmp_path: Path) -> Environment:
    """A real environment with small wheels in it: vllm needs torch, torch an NVIDIA library, other nobody."""
    lock = tmp_path / "empty.txt"
    lock.write_text("")
    made = environment.create(lock, tmp_path / "environment", Indexes(()), offline=True)
    library = compiled(tmp_path / "lib.so", "int one(void) { return 1; }", "-g")
    quick = {"quick.py": "", "quick-1.0.dist-info/entry_points.txt": SCRIPTS}
    for name, content, requires in (
        ("vllm", {"vllm/__init__.py": "", "vllm/_C.so": library}, ["torch==1.0", "x; extra == 'more'"]),
        ("torch", {"torch/__init__.py": "", "torch/tests/a.py": "a"}, ["nvidia-cublas-cu12", "small[fast]"]),
        ("nvidia_cublas_cu12", {"nvidia/__init__.py": "", "nvidia/cublas/lib/libcublas.so.12": library}, []),
        ("nvidia_other_cu12", {"nvidia/__init__.py": "", "nvidia/other/lib/libother.so.1": library}, []),
        ("small", {"small.py": ""}, ["quick; extra == 'fast'"]),
        ("quick", quick, []),
    ):
        metadata = "".join(f"Requires-Dist: {one}\n" for one in requires)
        environment.install_wheel(made, wheel(tmp_path / name, content, name=name, metadata=metadata))
    return made


def test_what_the_roots_need_goes_in_extras_included_and_nothing_else(settled: Environment) -> None:
    assert reachable(settled, ("vllm", "torch")) == {"vllm", "torch", "nvidia-cublas-cu12", "small", "quick"}
    with pytest.raises(ImageError, match="the lock lacks ray, which a wheel requires"):
        reachable(settled, ("vllm", "ray"))


def leave_out(tmp_path: Path, text: str) -> LeaveOut:
    path = tmp_path / "leave-out.toml"
    path.write_text(text)
    return LeaveOut.load(path)


OMITTED = """
[[files]]
project = "torch"
patterns = ["torch/tests/*"]
why = "tests"

[[entry_points]]
project = "quick"
lines = ["gone = quick:gone"]

[[strip]]
project = "vllm"
patterns = ["vllm/_C.so"]
why = "debug data"
"""


def test_every_file_is_in_one_layer_and_what_is_left_out_is_told(settled: Environment, tmp_path: Path) -> None:
    projects = reachable(settled, ("vllm", "torch"))
    content = lay_out(settled, projects, leave_out(tmp_path, OMITTED), tmp_path / "context")
    found = {layer: files_of(tmp_path / "context" / layer) for layer in layers.LAYERS}
    everything = [name for names in found.values() for name in names]
    assert len(everything) == len(set(everything))
    site = f"{layers.PREFIX}/{settled.site_packages.relative_to(settled.path)}"
    assert f"{site}/torch/__init__.py" in found["torch"]
    assert f"{site}/nvidia/cublas/lib/libcublas.so.12" in found["nvidia-cublas-cu12"]
    assert f"{site}/quick.py" in found["packages"]
    assert not [name for name in everything if "other" in name or "/tests/" in name or "direct_url" in name]
    told = {part.what: part for part in content.left_out}
    assert told["torch: torch/tests/*"].size == 1
    assert told["nvidia-other-cu12"].why == "required by nothing in the image"
    assert told["vllm: vllm/_C.so"].size > 0
    assert content.layers["vllm"] == content.projects["vllm"]


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_record_and_entry_points_tell_what_is_left(settled: Environment, tmp_path: Path) -> None:
    lay_out(settled, reachable(settled, ("vllm",)), leave_out(tmp_path, OMITTED), tmp_path / "context")
    [record] = (tmp_path / "context/torch").rglob("RECORD")
    assert "torch/__init__.py" in record.read_text()
    assert "tests" not in record.read_text()
    [entries] = (tmp_path / "context/packages").rglob("entry_points.txt")
    assert entries.read_text() == "[console_scripts]\nquick = quick:main\n"
    original = next(settled.site_packages.glob("torch-*/RECORD"))
    assert "tests" in original.read_text(), "the environment shares its files with uv's cache"


def test_all_layers_together_are_the_environment_without_what_was_left_out(
    settled: Environment, tmp_path: Path
) -> None:
    lay_out(settled, reachable(settled, ("vllm",)), leave_out(tmp_path, OMITTED), tmp_path / "context")
    site = settled.site_packages.relative_to(settled.path)
    with layers.united(tmp_path / "context", tmp_path / "united") as united:
        assert {"torch", "vllm", "nvidia", "quick.py"} <= {path.name for path in (united / site).iterdir()}
        assert not (united / site / "torch/tests").exists()
        stripped = united / site / "vllm/_C.so"
        assert stripped.stat().st_size < (settled.site_packages / "vllm/_C.so").stat().st_size
    assert not (tmp_path / "united").exists()


def test_whatever_the_umask_everybody_can_read_the_image_and_uvs_cache_stays_as_it_was(settled, tmp_path) -> None:
    [library] = settled.site_packages.glob("nvidia/cublas/lib/*.so*")
    library.chmod(0o700)
    before = os.umask(0o077)
    try:
        lay_out(settled, reachable(settled, ("vllm",)), leave_out(tmp_path, OMITTED), tmp_path / "context")
        layers.set_modes(tmp_path / "context")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "context").rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o755}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o755, 0o644}
    assert stat.S_IMODE(library.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[files]]\nproject = "torch"\npatterns = ["torch/none/*"]\nwhy = "x"', "names files that are not there"),
        ('[[entry_points]]\nproject = "quick"\nlines = ["none = a:b"]', "names entry points that are not there"),
        ('[[files]]\nproject = "torch"\nwhy = "x"', "files.0.patterns"),
        ("files = ", "cannot be read"),
    ],
)
def test_a_rule_that_fits_nothing_or_is_malformed_is_refused(settled, tmp_path, text, said) -> None:
    with pytest.raises(ImageError, match=said):
        lay_out(settled, reachable(settled, ("vllm",)), leave_out(tmp_path, text), tmp_path / "context")


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whether an engine can build here at all: it needs to mount, which many containers forbid; CI's machine can."""
    try:
        small_image(tmp_path_factory.mktemp("works"), "localhost/voltforge-test:works", "b")
    except VoltforgeError as error:
        pytest.skip(f"no engine can build an image on this machine: {error.what}")


def small_image(folder: Path, tag: str, content: str, label: str = "b", *, stays: bool = False) -> Path:
    """An image of two small layers, built by the engine that is here, as a layout with a health check.

    With ``stays`` the engine goes on to have it.
    """
    (folder / "context/one").mkdir(parents=True)
    (folder / "context/two").mkdir()
    (folder / "context/one/a.txt").write_text("a")
    (folder / "context/two/b.txt").write_text(content)
    (folder / "Dockerfile").write_text("ARG BASE\nFROM ${BASE}\nCOPY one/ /\nCOPY two/ /\nUSER 1000\n")
    chosen = container_engine.choose()
    chosen.build(folder / "Dockerfile", folder / "context", tag, {"BASE": "scratch"}, {"a.label": label})
    chosen.export(tag, folder / "layout", ["1.0", "latest"])
    layers.complete(folder / "layout", {"Test": ["CMD", "true"]})
    layers.archive(folder / "layout", folder / "image.tar")
    if not stays:
        subprocess.run([chosen.kind, "rmi", "--force", tag], check=True, capture_output=True)
    return folder / "image.tar"


@pytest.mark.slow
def test_equal_contents_give_equal_archives_and_a_change_moves_only_its_layer(works: None, tmp_path: Path) -> None:
    one, two = (small_image(tmp_path / name, f"localhost/voltforge-test:{name}", "b") for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    small_image(tmp_path / "other", "localhost/voltforge-test:other", "c")
    first, second = (layers.compressed(tmp_path / name / "layout") for name in ("one", "other"))
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False]


@pytest.mark.slow
def test_an_archive_is_the_same_whatever_was_built_before_it(
    works: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that an engine takes from its cache bear the labels of the image that they were made for."""
    if container_engine.choose().kind == "docker":
        pytest.skip("docker has one store, and buildah and podman are what images are built with in CI")
    made = []
    for name, earlier in (("used", ["old"]), ("empty", [])):
        store = tmp_path / name / "storage.conf"
        store.parent.mkdir()
        folders = {part: store.parent / part for part in ("graphroot", "runroot")}
        store.write_text(
            '[storage]\ndriver = "vfs"\n' + "".join(f'{key} = "{path}"\n' for key, path in folders.items())
        )
        monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(store))
        for label in (*earlier, "new"):
            path = small_image(tmp_path / name / label, "localhost/voltforge-test:stores", "b", label, stays=True)
        made.append(path.read_bytes())
    assert made[0] == made[1]


@pytest.mark.slow
def test_an_archive_has_both_names_a_health_check_and_labels(works: None, tmp_path: Path) -> None:
    path = small_image(tmp_path / "one", "localhost/voltforge-test:names", "b")
    for name in ("1.0", "latest"):
        told = subprocess.run(
            ["skopeo", "inspect", "--config", f"oci-archive:{path}:{name}"], capture_output=True, text=True, check=True
        )
        config = json.loads(told.stdout)["config"]
        assert config["Labels"]["a.label"] == "b"
        assert config["User"] == "1000"
    with tarfile.open(path) as tar:
        contents = [tar.extractfile(member).read() for member in tar if member.isfile() and "sha256" in member.name]
    configs = [json.loads(content) for content in contents if content.startswith(b"{") and b"rootfs" in content]
    assert [config["config"]["Healthcheck"] for config in configs] == [{"Test": ["CMD", "true"]}]


# The real image, of the wheelhouse's own wheels.


@pytest.fixture(scope="module")
def results(repository: Path, vllm: Pipeline, works: None) -> dict:
    """What `./doit torch=thin wheels image` made: ten minutes on two cores, nothing if it ran before."""
    doit("torch=thin", "wheels")
    doit("torch=thin", "image")
    return json.loads((repository / "build/stages/image.json").read_text())["results"]


@pytest.fixture(scope="module")
def container(results: dict) -> Iterator[str]:
    """A container of the image."""
    tag = f"localhost/voltforge:{results['tags'][0]}"
    name = subprocess.run(["buildah", "from", tag], capture_output=True, text=True, check=True).stdout.strip()
    yield name
    subprocess.run(["buildah", "rm", name], check=True, capture_output=True)


def inside(container: str, *words: str, options: tuple[str, ...] = (), status: int = 0) -> str:
    command = ["buildah", "run", "--isolation", "chroot", *options, container, "--", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


WITHOUT_A_GPU = ("env", "LD_LIBRARY_PATH=/mnt/driver", "PYTHONPATH=/mnt")


def without_a_gpu(repository: Path, driver_stub: DriverStub) -> dict[Path, str]:
    """What is mounted where a GPU is pretended."""
    return {repository / "volta": "volta", driver_stub.path: "driver"}


def mounted(places: dict[Path, str]) -> tuple[str, ...]:
    return tuple(word for real, name in places.items() for word in ("--volume", f"{real}:/mnt/{name}:ro"))


@pytest.mark.build
def test_the_image_is_small_and_an_update_of_vllm_moves_little(results: dict) -> None:
    layers = [size for _, size in results["compressed"]]
    assert results["base_size"] + sum(results["layers"].values()) <= 6_500_000_000
    assert sum(layers) <= 3_200_000_000
    assert sum(layers[-3:]) < 100_000_000, "vllm's own layer, its kernels and the configuration are the last"
    assert 0 < results["layers"]["kernels"] <= 20_000_000, (
        "what is compiled ahead for the shapes in volta/triton_kernels/model_shapes.py"
    )
    assert layers[-2] <= 1_000_000


@pytest.mark.build
def test_the_archive_says_what_it_is_made_of_and_how_it_is_run(results: dict, repository: Path) -> None:
    told = subprocess.run(
        ["skopeo", "inspect", "--config", f"oci-archive:{results['path']}:latest"],
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
def test_what_is_in_the_image_imports_and_goes_together(container: str, repository: Path) -> None:
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
def test_the_images_own_triton_finds_every_kernel_that_was_compiled_ahead(
    container: str, repository: Path, driver_stub: DriverStub
) -> None:
    """Compilers that are called for one refuse; the calls are vLLM's own, on a pretended card."""
    options = mounted(without_a_gpu(repository, driver_stub))
    said = inside(container, *WITHOUT_A_GPU, "PYTHONPATH=/mnt:/opt/voltforge", "sh", "-c", FOUND, options=options)
    found = re.search(r"(\d+) kernels, all in the cache", said)
    assert found
    assert int(found[1]) > 300


@pytest.mark.build
def test_the_image_is_run_by_nobody_special(container: str) -> None:
    said = inside(container, "sh", "-c", "id -u; touch /opt/vllm/x 2>/dev/null || echo refused")
    assert said.split() == ["1000", "refused"]


@pytest.mark.build
def test_the_image_names_nothing_of_the_build_machine(container: str, repository: Path) -> None:
    told = subprocess.run(["buildah", "mount", container], capture_output=True, text=True, check=True)
    root = Path(told.stdout.strip())
    folders = [root / name for name in ("opt", "etc", "home", "var")]
    words = ["grep", "-rlF", "--exclude=*.so*", str(repository), *folders]
    assert subprocess.run(words, capture_output=True, text=True, check=False).stdout == ""
    assert not (root / "etc/apt/sources.list").exists()


@pytest.mark.build
def test_without_a_gpu_the_image_says_so_in_a_sentence(container: str) -> None:
    start = ("/opt/vllm/bin/python", "/opt/voltforge/start.py")
    said = inside(container, *start, "--model", "some/model", status=1)
    [line] = [line for line in said.splitlines() if line.startswith("voltforge: ")]
    assert "no NVIDIA driver is to be seen in this container" in line
    assert "Traceback" not in said
    assert inside(container, *start, "--version").startswith("0.12.0+sm70")
    assert "docker run --gpus all" in inside(container, *start, "--help", status=1)


@pytest.mark.build
def test_a_base_with_another_python_is_refused_in_words(results: dict, repository: Path, tmp_path: Path) -> None:
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
def test_why_tells_layers_projects_and_what_was_left_out(results: dict, repository: Path) -> None:
    said = doit("torch=thin", "image:why")
    for word in ("nvidia-cudnn-cu12", "packages", "required by", "back end"):
        assert word in said
