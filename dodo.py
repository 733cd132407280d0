"""PyTorch and vLLM wheels for NVIDIA Volta, from source: the graph. `./doit list` is its table of contents."""

import sys
from pathlib import Path

from doit import get_var

from voltforge.commands import (
    bench,
    doctor,
    farm,
    gc,
    help,
    keys,
    lock,
    push,
    reproduce,
    serve,
    tasks,
    test,
    thin,
    verify,
    why,
)  # fmt: skip
from voltforge.gpu import bundle, triton_kernels
from voltforge.image.stages import Runtime

ROOT = Path(__file__).parent
PIPELINE = tasks.loaded(ROOT, get_var)
RUNTIME = Runtime(PIPELINE)
DOIT_CONFIG = {
    "default_tasks": ["about"],
    "reporter": tasks.Reporter,
    "verbosity": 2,
    "continue": PIPELINE.store.offline,  # then all that is missing is told at once
}


def task_wheels():
    """compile, check and keep the wheels: all of them, or one as wheels:vllm"""
    yield {"name": None, "task_dep": ["downloads"]}
    yield from tasks.each(PIPELINE, "wheels")


def task_image():
    """put the wheels together to a slim runtime image: an OCI archive in build/image/ (base=IMAGE)"""
    base, sizes = (
        "make a base of the distribution's packages, where no registry can be reached",
        "print what weighs what",
    )
    yield {**tasks.of(RUNTIME.image, PIPELINE), "basename": "image"}
    yield {**tasks.of(RUNTIME.base, PIPELINE), "basename": "image:base", "doc": base}
    yield {**tasks.action(RUNTIME.why), "basename": "image:why", "doc": f"{sizes} in the image, and what was left out"}


def task_serve():
    """measure a running server: serve:check url=http://127.0.0.1:8000"""
    yield {"name": "check", **tasks.action(serve.check_server, PIPELINE)}


def task_why():
    """say which inputs of a stage changed since its result was kept: why wheels:vllm"""
    return tasks.action(why.explain, PIPELINE, RUNTIME, takes_names=True)


def task_verify():
    """hold the wheels that were kept to their recipes again, or any wheel with file=PATH.whl"""
    triton = "compile vLLM's Triton kernels for 7.0 and hold them to a Volta's limits"
    card = "run the kernels of 7.0 on this machine's NVIDIA card, whichever it is, and compare with float64"
    yield {**tasks.action(verify.verify_wheels, PIPELINE, turn=PIPELINE.turn), "basename": "verify"}
    yield {
        **tasks.action(triton_kernels.verify, PIPELINE, turn=PIPELINE.turn),
        "basename": "verify:triton",
        "doc": triton,
    }
    on_card = tasks.action(bundle.verify, PIPELINE, turn=PIPELINE.turn)
    yield {**on_card, "basename": "verify:gpu", "doc": card, "task_dep": ["gpu-bundle"]}


def task_gpu_bundle():
    """put the kernels of 7.0, inputs and references into one file, to be run on a machine with a card and no network"""
    return {**tasks.of(bundle.bundle(PIPELINE), PIPELINE), "basename": "gpu-bundle"}


def task_reproduce():
    """build again, elsewhere and under other conditions, and compare the bytes: reproduce:vllm, reproduce:image"""
    for name in PIPELINE.recipes:
        again = tasks.action(reproduce.wheel, PIPELINE, name, turn=PIPELINE.turn)
        yield {"name": name, "task_dep": [f"wheels:{name}"], **again}
    again = tasks.action(reproduce.image, PIPELINE, RUNTIME, turn=PIPELINE.turn)
    yield {"name": "image", "task_dep": ["image"], **again}


def task_key():
    """show the key that wheels are signed with; the first time it makes one"""
    return tasks.action(keys.show_key, PIPELINE, turn=PIPELINE.turn)


def task_push():
    """give the wheels to the shared cache that VOLTFORGE_CACHE names: a folder or an address"""
    return tasks.action(push.push_wheels, PIPELINE, turn=PIPELINE.turn)


def task_farm():
    """show the hosts that build together at a redis server: ccache=redis://HOST"""
    helping = "help whoever builds at that server, until Ctrl-C: each object is compiled by one host, for all"
    yield {**tasks.action(farm.show_hosts, PIPELINE), "basename": "farm"}
    yield {**tasks.action(farm.help_hosts, PIPELINE), "basename": "farm:help", "doc": helping}


def task_gc():
    """list what no recipe needs any more, and its size; gc=delete removes it"""
    return tasks.action(gc.collect, PIPELINE, RUNTIME, turn=PIPELINE.turn)


def task_thin():
    """take the device code of other GPUs out of any wheel: file=PATH.whl arch=7.0"""
    return tasks.action(thin.thin_wheel, PIPELINE)


def task_doctor():
    """say what this machine lacks, and the command that gets it"""
    return tasks.action(doctor.report, PIPELINE)


def task_test():
    """run the tests, slow ones included"""
    return tasks.action(test.run_tests, ROOT)


def task_lock():
    """pin every requirement anew, with hashes, for Python 3.10 to 3.13"""
    return tasks.action(lock.write_locks, PIPELINE)


def task_bench():
    """make the README's numbers (hours)"""
    chart = "chart the last build from ninja's log: critical path, what more cores would give; build/profile/"
    yield {**tasks.action(bench.run_benchmarks, ROOT), "basename": "bench"}
    yield {**tasks.action(bench.chart_builds, PIPELINE), "basename": "bench:profile", "doc": chart}


def task_about():
    """say what voltforge can do (also: ./doit list, ./doit help)"""
    return tasks.action(help.print_tasks, sys.modules[__name__])


# The stages, in the order that the data takes; `wheels` runs what it needs of them.


def task_downloads():
    """stage 0: the sources of all packages, downloaded at once"""
    return tasks.downloads(PIPELINE)


def task_fetch():
    """stage 1: the source, by its hash"""
    yield from tasks.each(PIPELINE, "fetch")


def task_tree():
    """stage 2: the source unpacked, with the patch series applied"""
    yield from tasks.each(PIPELINE, "tree")


def task_toolchain():
    """stage 3: a CUDA 12 toolkit that can target the arch (cuda=system|redist|distro picks one)"""
    return tasks.of(PIPELINE.toolchain, PIPELINE)


def task_driver_stub():
    """a stand-in for the driver's library, for machines without a GPU"""
    return {**tasks.of(PIPELINE.driver_stub, PIPELINE), "basename": "driver-stub"}


def task_environment():
    """stage 4: the locked Python environment that it is compiled in"""
    yield from tasks.each(PIPELINE, "environment")


def task_build():
    """stage 5: the wheel, compiled and finished (jobs=N, sandbox=auto|require|off)"""
    yield from tasks.each(PIPELINE, "build")


def task_check():
    """stage 6: what the wheel holds, and whether it imports in a fresh environment"""
    yield from tasks.each(PIPELINE, "check")
