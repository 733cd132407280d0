"""PyTorch and vLLM for NVIDIA Volta: every task of `./doit`, in the order of `./doit list`."""

from pathlib import Path

from doit import get_var

from voltforge.commands import command_line, reporter, tasks
from voltforge.gpu import bundle
from voltforge.image.stages import RuntimeImage

ROOT = Path(__file__).parent
PIPELINE = command_line.load_pipeline(ROOT, get_var)
RUNTIME = RuntimeImage(PIPELINE)
DOIT_CONFIG = {
    "default_tasks": ["about"],
    "reporter": reporter.Reporter,
    "verbosity": 2,
    "continue": PIPELINE.store.offline,  # so that one run reports every missing file
}


def task_wheels():
    """make the wheels in wheelhouse/: all, or one with wheels:vllm (torch=source compiles PyTorch too)"""
    yield from tasks.wheels(PIPELINE, task_wheels.__doc__)


def task_image():
    """make the wheels and a slim runtime image of them: an OCI archive in build/image/ (base=IMAGE)"""
    image = tasks.of(RUNTIME.image, PIPELINE)
    base, sizes = "make a base of the distribution's packages", "print the sizes in the image, and what was left out"
    held = "make the image of the wheels that the wheelhouse holds; make no wheels"
    yield {**image, "basename": "image", "task_dep": ["wheels", *image["task_dep"]]}
    yield {**image, "basename": "image:of-wheelhouse", "doc": held}
    yield {**tasks.of(RUNTIME.base, PIPELINE), "basename": "image:base", "doc": base}
    yield {**tasks.action(RUNTIME.why), "basename": "image:why", "doc": sizes}


def task_serve():
    """measure a running server: serve:check url=http://127.0.0.1:8000"""
    yield {"name": "check", **tasks.action("commands.serve:check_server", PIPELINE)}


def task_why():
    """print which inputs of a stage changed since its last run: why wheels:vllm"""
    return tasks.action("commands.why:explain", PIPELINE, RUNTIME, takes_names=True)


def task_verify():
    """check the wheels of the wheelhouse against their recipes, or any wheel with file=PATH.whl"""
    triton = "compile vLLM's Triton kernels for 7.0 and check them against Volta's limits"
    card = "run the kernels of 7.0 on this machine's NVIDIA card, and compare the results with float64"
    yield {**tasks.locked("commands.verify:verify_wheels", PIPELINE), "basename": "verify"}
    yield {**tasks.locked("gpu.triton_kernels:verify", PIPELINE), "basename": "verify:triton", "doc": triton}
    on_card = tasks.locked("gpu.bundle:verify", PIPELINE)
    yield {**on_card, "basename": "verify:gpu", "doc": card, "task_dep": ["gpu-bundle"]}


def task_gpu_bundle():
    """pack the kernels of 7.0, inputs and references into one file, for a machine with a card and no network"""
    return {**tasks.of(bundle.bundle(PIPELINE), PIPELINE), "basename": "gpu-bundle"}


def task_reproduce():
    """build again in another place and environment, and compare the bytes: reproduce:vllm, reproduce:image"""
    for name in PIPELINE.recipes:
        again = tasks.locked("commands.reproduce:wheel", PIPELINE, name)
        yield {"name": name, "task_dep": [f"wheels:{name}"], **again}
    again = tasks.locked("commands.reproduce:image", PIPELINE, RUNTIME)
    yield {"name": "image", "task_dep": ["image"], **again}


def task_key():
    """print the public key that signs the wheels; the first call makes it"""
    return tasks.locked("commands.keys:show_key", PIPELINE)


def task_push():
    """upload the wheels to the shared cache that VOLTFORGE_CACHE names: a folder or a URL"""
    return tasks.locked("commands.push:push_wheels", PIPELINE)


def task_farm():
    """list the hosts that build together at a Redis server: ccache=redis://HOST"""
    helping = "build what the other hosts build, until Ctrl-C: each object is compiled by one host, for all"
    yield {**tasks.action("commands.farm:show_hosts", PIPELINE), "basename": "farm"}
    yield {**tasks.action("commands.farm:help_hosts", PIPELINE), "basename": "farm:help", "doc": helping}


def task_gc():
    """list files that no recipe needs, with sizes; gc=delete removes them"""
    return tasks.locked("commands.gc:collect", PIPELINE, RUNTIME)


def task_thin():
    """remove the device code of other GPUs from any wheel: file=PATH.whl arch=7.0"""
    return tasks.action("commands.thin:thin_wheel", PIPELINE)


def task_doctor():
    """list what this machine lacks, with the commands that install it"""
    return tasks.action("commands.doctor:report", PIPELINE)


def task_test():
    """run linter, type checker and tests, slow ones included"""
    every = "run all tests, also those that rotate and those that passed with the same inputs"
    packages = "install the packages of tests and benchmarks into .venv, and run nothing"
    yield {**tasks.action("commands.test:run_tests", ROOT), "basename": "test"}
    yield {**tasks.action("commands.test:run_all_tests", ROOT), "basename": "test:all", "doc": every}
    yield {**tasks.action("commands.dev_packages:install", ROOT), "basename": "test:packages", "doc": packages}


def task_lock():
    """pin every requirement to its newest version, with hashes, for Python 3.10 to 3.13"""
    return tasks.action("commands.lock:write_locks", PIPELINE)


def task_bench():
    """run all benchmarks: the source of the README's numbers (hours)"""
    chart = "chart the last build from ninja's log: critical path, gain of more cores; build/profile/"
    yield {**tasks.action("commands.bench:run_benchmarks", ROOT), "basename": "bench"}
    yield {**tasks.action("commands.bench:chart_builds", PIPELINE), "basename": "bench:profile", "doc": chart}


def task_about():
    """list the tasks (also: ./doit help, ./doit list)"""
    return tasks.action("commands.help:print_tasks", ROOT)


# The stages of a wheel, in order. `wheels` runs them.


def task_downloads():
    """stage 0: download the sources of all packages at once"""
    return tasks.downloads(PIPELINE)


def task_fetch():
    """stage 1: download the source and check its hash"""
    yield from tasks.package_tasks(PIPELINE, "fetch", task_fetch.__doc__)


def task_tree():
    """stage 2: unpack the source and apply the patches"""
    yield from tasks.package_tasks(PIPELINE, "tree", task_tree.__doc__)


def task_toolchain():
    """stage 3: find or fetch a CUDA 12 toolkit that can target 7.0 (cuda=system|redist|distro)"""
    return tasks.of(PIPELINE.toolchain, PIPELINE)


def task_driver_stub():
    """make a stub of the driver's library, for machines without a GPU"""
    return {**tasks.of(PIPELINE.driver_stub, PIPELINE), "basename": "driver-stub"}


def task_environment():
    """stage 4: install the locked Python environment of the build"""
    yield from tasks.package_tasks(PIPELINE, "environment", task_environment.__doc__)


def task_build():
    """stage 5: compile the wheel (jobs=N, sandbox=auto|require|off)"""
    yield from tasks.package_tasks(PIPELINE, "build", task_build.__doc__)


def task_check():
    """stage 6: check the wheel's content, and import it in a fresh environment"""
    yield from tasks.package_tasks(PIPELINE, "check", task_check.__doc__)
