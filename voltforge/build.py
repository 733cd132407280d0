"""One build: a tree compiled in its environment with its toolchain, watched, logged, and resumable."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voltforge import console, files
from voltforge.environment import Environment
from voltforge.errors import VoltforgeError
from voltforge.process import ProgramFailed, Usage, run
from voltforge.recipe import SourceRecipe
from voltforge.sandbox import Sandbox
from voltforge.toolchain import Toolchain
from voltforge.tree import Tree, sync

ERROR = re.compile(
    r"(?:\b(?:fatal )?error\b ?:|\bError:|\bfatal *:|undefined reference|cannot find -l|No space left on device)"
)
"""How gcc, nvcc, cicc, ptxas, ld, CMake and Python begin the line that matters."""
FOLDERS = ("tree", "environment", "toolchain", "dist", "home")
"""What a build is shown, by name; the sandbox decides where."""
EXCERPT = 12
"""Lines of the log that are shown around the first error."""


class BuildError(VoltforgeError):
    """A build that ended badly; ``excerpt`` holds the first error and its surroundings, ``log`` the whole."""

    def __init__(self, name: str, excerpt: str, log: Path, why: str) -> None:
        shown = "".join(f"\n  | {line}" for line in excerpt.splitlines())
        super().__init__(
            f"{name} was not built ({why}); the first error:{shown}",
            hint=f"the whole log is {log}; the next run resumes",
        )
        self.excerpt = excerpt
        self.log = log


@dataclass(frozen=True)
class Built:
    """A wheel as the build left it, before it is finished."""

    wheel: Path
    linked: Mapping[str, int]
    """CUDA objects linked into each expected extension."""
    usage: Usage


def variables(recipe: SourceRecipe, tree: Tree, toolchain: Toolchain, places: Mapping[str, Path]) -> dict[str, str]:
    """The whole environment of a build, but for the number of jobs: nothing else reaches it.

    ``places`` says where the build sees its ``tree``, ``environment``, ``toolchain`` and ``home``. Every path is
    mapped away in what compilers write (gcc's -ffile-prefix-map), so that no binary names a folder of the build.
    """
    tools = places["environment"], places["toolchain"]
    site = Environment(places["environment"]).site_packages
    maps = {
        places["tree"]: ".",
        site: "site-packages",
        places["environment"]: "environment",
        places["toolchain"]: "cuda",
    }
    mapped = [f"-ffile-prefix-map={path}={name}" for path, name in maps.items()]
    return {
        "PATH": ":".join([*(f"{folder}/bin" for folder in tools), str(toolchain.host.cxx.parent), "/usr/bin", "/bin"]),
        "HOME": str(places["home"]),
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SOURCE_DATE_EPOCH": str(tree.epoch),
        "NINJA_STATUS": "[%f/%t] ",
        "CC": str(toolchain.host.cc),
        "CXX": str(toolchain.host.cxx),
        "LIBRARY_PATH": ":".join(f"{places['toolchain']}/{folder}" for folder in ("lib64", "lib64/stubs")),
        "CUDA_HOME": str(places["toolchain"]),
        "CUDACXX": f"{places['toolchain']}/bin/nvcc",
        "CUDAHOSTCXX": str(toolchain.host.cxx),
        "CFLAGS": " ".join(mapped),
        "CXXFLAGS": " ".join(mapped),
        # The toolkit has no static runtime; nvcc's temporary files get names that do not carry its process id.
        "CUDAFLAGS": " ".join(["-cudart=shared", "--objdir-as-tempdir", *(f"-Xcompiler={flag}" for flag in mapped)]),
        **recipe.build.variables(cuda=toolchain.tag, site=str(site), **recipe.variables),
    }


def compile(
    recipe: SourceRecipe, tree: Tree, environment: Environment, toolchain: Toolchain,
    *, sandbox: Sandbox, jobs: int, work: Path, log: Path,
) -> Built:  # fmt: skip
    """Compile ``tree`` to a wheel in ``work``, which keeps the objects: a killed or repeated build goes on there.

    Raises:
        BuildError: it failed; the first error is shown, the log named.
    """
    source, dist, home = work / "tree", work / "dist", work / "home"
    for folder in (source, home):
        folder.mkdir(parents=True, exist_ok=True)
    sync(tree.path, source)
    for stale in [dist, *source.glob("build/lib*"), *source.glob("build/bdist*"), *source.glob("*.egg-info")]:
        files.remove(stale)
    dist.mkdir()
    real = (source, environment.path, toolchain.home, dist, home)
    folders = {name: path.absolute() for name, path in zip(FOLDERS, real, strict=True)}
    places = {name: sandbox.place(name, path) for name, path in folders.items()}
    argv = sandbox.command(
        [places["environment"] / "bin/python", "-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check",
         *(f"--config-setting={name}={value}" for name, value in recipe.build.config_settings.items()),
         "--outdir", places["dist"], places["tree"]],
        writable={name: folders[name] for name in ("tree", "dist", "home")},
        readable={name: folders[name] for name in ("environment", "toolchain")},
        cwd=places["tree"],
    )  # fmt: skip
    handed = variables(recipe, tree, toolchain, places) | {
        "MAX_JOBS": str(jobs),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
    }
    log.unlink(missing_ok=True)
    with console.live(recipe.name) as tell:
        progress = Progress()
        try:
            done = run(argv, cwd=source, env=handed, log=log, watch=lambda line, usage: tell(progress.see(line, usage)))
        except ProgramFailed as error:
            raise BuildError(recipe.name, first_error(log), log, f"status {error.status}") from error
    wheels = list(dist.glob("*.whl"))
    if len(wheels) != 1:
        raise BuildError(recipe.name, done.output[-500:], log, f"left {len(wheels)} wheels where one was expected")
    ninja = environment.path / "bin" / "ninja"
    return Built(wheels[0], {name: _linked(ninja, source, name) for name in recipe.expect.extensions}, done.usage)


class Progress:
    """What the live line says, from the lines that a build prints: ninja's ``[n/m]``, time and memory."""

    def __init__(self) -> None:
        self.text = "configuring"
        self.start = time.monotonic()

    def see(self, line: str, usage: Usage) -> str:
        """Take a line in and give the newest text."""
        if match := re.match(r"\[(\d+)/(\d+)\] (.*)", line):
            target = match[3].split()[-1].rsplit("/", 1)[-1]
            self.text = f"[{match[1]}/{match[2]}] {target}"
        elapsed = int(time.monotonic() - self.start)
        return f"{self.text}, {elapsed // 60}:{elapsed % 60:02}, {files.size(usage.now)}"


def first_error(log: Path) -> str:
    """The first error of a build's log and the lines around it, or its last lines if none stands out."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "(there is no log)"
    failed = next((number for number, line in enumerate(lines) if line.startswith("FAILED:")), 0)
    found = next((number for number in range(failed, len(lines)) if ERROR.search(lines[number])), None)
    if found is None:
        return "\n".join(lines[-EXCERPT:])
    head = [lines[failed]] if failed and failed < found else []
    return "\n".join(line[:300] for line in [*head, *lines[found : found + EXCERPT]])


def _linked(ninja: Path, source: Path, extension: str) -> int:
    """How many CUDA objects ninja linked into an extension."""
    name, count = Path(extension).name, 0
    for script in source.rglob("build.ninja"):
        targets = _ask(ninja, script, "targets", "all")
        for target in {line.rsplit(": ", 1)[0] for line in targets if line.rsplit(": ", 1)[0].endswith(name)}:
            inputs = {line.strip() for line in _ask(ninja, script, "query", target)}
            count = max(count, sum(line.endswith(".cu.o") for line in inputs))
    return count


def _ask(ninja: Path, script: Path, *words: str) -> Sequence[str]:
    tool = os.path.realpath(ninja)
    return run([tool, "-C", script.parent, "-t", *words]).output.splitlines()
