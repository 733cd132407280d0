"""One build: compile a tree in its environment with its toolchain; watched, logged and resumable."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from voltforge.compile import farm, object_cache, sandbox
from voltforge.compile.farm import Farm
from voltforge.compile.object_cache import Found, Objects, Server
from voltforge.compile.sandbox import Sandbox
from voltforge.compile.scheduler import Scheduler
from voltforge.compile.toolchain import Toolchain
from voltforge.errors import VoltforgeError, remedy
from voltforge.sources import options
from voltforge.sources.environment import Environment
from voltforge.sources.recipe import SourceRecipe
from voltforge.sources.tree import Tree, sync
from voltforge.system import console, files
from voltforge.system.process import Completed, ProgramFailed, Usage, run
from voltforge.system.progress import ProgressState

ERROR = re.compile(
    r"\b(?:fatal )?error\b ?:|\bError:|\bfatal *:|undefined reference|cannot find -l"
    r"|No space left on device|Disk quota exceeded|Read-only file system"
)
"""The beginnings of error lines of gcc, nvcc, cicc, ptxas, ld and CMake, and the machine's own errors."""
FOLDERS = ("tree", "environment", "toolchain", "dist", "home")
"""The folders that a build sees, by name; the sandbox decides their paths."""
PLACE = "place.json"
"""A note in the work folder: the path at which the build saw its tree."""
ASKING = "asking.json"
"""A note in the work folder: whether the compilers of its build ask a scheduler."""
UNSYNCED = "unsynced.json"
"""A note in the work folder: the boot of the machine in which a build began to write files that are not synced yet."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
"""The kernel's id of this boot (random(4))."""
TOLERANCE = 2.0
"""Seconds that a file may be newer than now: clocks are coarse, some file systems' by as much."""
EXCERPT = 12
"""Lines of the log around the first error that are printed."""


class BuildError(VoltforgeError):
    """A build failed. ``excerpt`` is the first error and the lines around it, ``log`` the path of the whole log."""

    def __init__(self, name: str, excerpt: str, log: Path, why: str) -> None:
        shown = "".join(f"\n  | {line}" for line in excerpt.splitlines())
        super().__init__(
            f"{name} was not built ({why}); the first error:{shown}",
            hint=_then(remedy(excerpt), f"the whole log is {log}; the next run resumes"),
        )
        self.excerpt = excerpt
        self.log = log


class DiskError(VoltforgeError):
    """The file system refused to write a build's folders or its log."""

    def __init__(self, name: str, log: Path, error: OSError) -> None:
        said = error.strerror or error.args[0][0][-1]  # shutil.Error has a list of the files that were not copied
        where = error.filename2 or error.filename or log  # a failed write has no file name
        super().__init__(
            f"{name} was not built: {where}: {said}",
            hint=_then(remedy(said, "check who owns it"), "the next run resumes"),
        )


@dataclass(frozen=True)
class Built:
    """A wheel as the build wrote it, not yet finished."""

    wheel: Path
    linked: Mapping[str, int]
    """The number of CUDA objects linked into each expected extension."""
    usage: Usage
    found: Found
    """The use of the object cache."""
    hosts: Mapping[str, int] = field(default_factory=dict)
    """The number of objects that each host of a farm compiled."""


def variables(recipe: SourceRecipe, tree: Tree, toolchain: Toolchain, places: Mapping[str, Path]) -> dict[str, str]:
    """Return the whole environment of a build, without the number of jobs.

    ``places`` are the paths at which the build sees its ``tree``, ``environment``, ``toolchain`` and ``home``. gcc's
    -ffile-prefix-map replaces each path in the compilers' output, so that no binary names a folder of the build.
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
    # The toolkit has no static runtime. --objdir-as-tempdir keeps nvcc's process id out of the names of temporary
    # files.
    cudaflags = " ".join(["-cudart=shared", "--objdir-as-tempdir", *(f"-Xcompiler={flag}" for flag in mapped)])
    filled = {"cuda": toolchain.tag, "environment": str(tools[0]), "site": str(site), "cudaflags": cudaflags}
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
        "CUDAFLAGS": cudaflags,
        **recipe.build.variables(**filled, **recipe.variables),
    }


@dataclass(frozen=True)
class Workshop:
    """The inputs, the tools and the folder of one build."""

    recipe: SourceRecipe
    tree: Tree
    environment: Environment
    toolchain: Toolchain
    sandbox: Sandbox
    jobs: int
    work: Path
    """The folder of the build; a killed or repeated build resumes here, with the objects of the last one."""
    scheduler: Scheduler | None = None
    """The scheduler of its compilers; ``jobs`` then bounds the compilers that run, not those that wait."""
    objects: Objects | None = None
    """The cache of compiled objects; requires a scheduler."""

    @staticmethod
    def can_ask(tree: Tree) -> bool:
        """Return True if the compilers of a tree can be made to ask a scheduler: CMake can run a launcher."""
        return (tree.path / "CMakeLists.txt").is_file()

    @property
    def folders(self) -> dict[str, Path]:
        """The real folders, by the names of :data:`FOLDERS`; also ``scheduler`` and ``cache`` if they exist."""
        real = (self.work / "tree", self.environment.path, self.toolchain.home, self.work / "dist", self.work / "home")
        named = dict(zip(FOLDERS, real, strict=True))
        named |= {"gate": self.scheduler.folder} if self.scheduler else {}
        named |= {"cache": self.objects.folder} if self.objects else {}
        return {name: path.absolute() for name, path in named.items()}

    @functools.cached_property
    def around(self) -> Sandbox:
        """The sandbox. If it cannot show the folders at their fixed places, they are moved there if possible."""
        if self.sandbox.kind != "none":
            return self.sandbox
        system = self.toolchain.origin == "system"  # can be all of /usr/local, which cannot be linked file by file
        if why := "the CUDA toolkit belongs to the machine" if system else sandbox.obstacle(self.work, self.readable):
            where = f"{self.folders['tree']}, not {sandbox.ROOT}/tree ({why})"
            console.note(f"building in {where}: the bytes can differ in other folders")
            return self.sandbox
        return replace(self.sandbox, moves=True)

    @property
    def writable(self) -> dict[str, Path]:
        """The real folders that the build can write."""
        return {
            name: path for name, path in self.folders.items() if name in ("tree", "dist", "home", *self._shown("cache"))
        }

    @property
    def readable(self) -> dict[str, Path]:
        """The real folders that the build can read."""
        shown = "environment", "toolchain", *self._shown("gate")
        return {name: path for name, path in self.folders.items() if name in shown}

    def _shown(self, name: str) -> tuple[str, ...]:
        """The folders that are not part of the build: without a sandbox they stay where they are, because others use
        them.
        """
        return () if self.sandbox.kind == "none" else (name,)

    @property
    def places(self) -> dict[str, Path]:
        """The paths at which the build sees the folders."""
        shown = {**self.readable, **self.writable}
        return {name: self.around.place(name, path) if name in shown else path for name, path in self.folders.items()}

    def prepare(self) -> None:
        """Copy the sources in, and remove the files that the last build packed."""
        sandbox.recover(self.work)
        self._begin_afresh_if_need_be()
        folders = self.folders
        for name in ("tree", "home"):
            folders[name].mkdir(parents=True, exist_ok=True)
        sync(self.tree.path, folders["tree"])
        for stale in [folders["dist"], *self.logs, *_packed(folders["tree"])]:
            files.remove(stale)
        folders["dist"].mkdir()
        files.write_json(self.work / PLACE, str(self.places["tree"]))
        files.write_json(self.work / ASKING, bool(self.scheduler))

    @property
    def logs(self) -> list[Path]:
        """The log of ccache, if it is used."""
        return [self.objects.log(self.recipe.name)] if self.objects else []

    def _begin_afresh_if_need_be(self) -> None:
        """Empty the work folder if ninja or CMake would trust stale files in it."""
        self.work.mkdir(parents=True, exist_ok=True)
        place = str(self.places["tree"])
        built = files.read_json(self.work / PLACE) or place
        unsynced = files.read_json(self.work / UNSYNCED)
        if unsynced not in (None, booted()):
            why = "the machine went down during the last build: the newest files can be incomplete"
        elif late := from_the_future(self.work):
            why = f"{late.relative_to(self.work)} is newer than the clock: the clock was set back"
        elif built != place:
            why = f"the last build ran in {built}"
        elif (self.work / PLACE).exists() and (files.read_json(self.work / ASKING) or False) != bool(self.scheduler):
            why = "the launcher of the compilers changed"  # some build systems configure only once
        else:
            return
        console.note(f"starting from scratch: {why}")
        files.remove(self.work)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Sync the files of the block to disk when it ends, however it ends except by a crash."""
        files.write_json(self.work / UNSYNCED, booted())
        try:
            yield
        finally:
            os.sync()
            (self.work / UNSYNCED).unlink(missing_ok=True)

    def run(
        self, argv: Sequence[str | Path], *, log: Path, watch: Callable[[str, Usage], None] | None = None
    ) -> Completed:
        """Run a program in the tree, as the build sees it, with the variables of the build only.

        Raises:
            ProgramFailed: the program fails.
        """
        places, folders = self.places, self.folders
        handed = variables(self.recipe, self.tree, self.toolchain, places)
        before, asked = self._asking(places)
        handed |= asked
        words = self.around.command(
            [*before, *argv], writable=self.writable, readable=self.readable, cwd=places["tree"]
        )
        start = places["tree"] if self.around.kind == "none" else folders["tree"]
        part = self.farm.register(self.recipe.name, self.made_with) if self.farm else contextlib.nullcontext()
        with self.around.shown(self.writable, self.readable), part:
            return run(words, cwd=start, env=handed, log=log, watch=watch)

    def _asking(self, places: Mapping[str, Path]) -> tuple[list[str | Path], dict[str, str]]:
        """Return the launcher of the compilers and its variables."""
        if not self.scheduler:
            return [], {"MAX_JOBS": str(self.jobs), "CMAKE_BUILD_PARALLEL_LEVEL": str(self.jobs)}
        self.scheduler.start(self.farm)
        python, many = places["environment"] / "bin" / "python", str(self.scheduler.ninja_jobs)
        handed = self.scheduler.variables(self.recipe.name, places["gate"], python)
        handed |= {"MAX_JOBS": many, "CMAKE_BUILD_PARALLEL_LEVEL": many}
        if not self.objects:
            return [], handed
        before: list[str | Path] = []
        server = self._server
        address = server.seen(server.host, server.port) if server else ""
        if server and self.around.hermetic:
            self.objects.lead(self.scheduler.folder)
            relay = places["gate"] / object_cache.RELAY.name
            before = [python, "-I", "-S", relay, str(object_cache.PORT), places["gate"] / object_cache.SOCKET]
            address = server.seen("127.0.0.1", object_cache.PORT)
        cached = self.objects.variables(self.recipe.name, files.digest(self.made_with), places["cache"], address)
        if self.farm:
            handed["VOLTFORGE_BUILD"] = self.build
        return before, {**handed, **cached}

    @functools.cached_property
    def _server(self) -> Server | None:
        """Return the server of the object cache, if the build can reach it."""
        server = self.objects.server if self.objects else None
        if server and not self.around.hermetic and self.around.kind != "none":
            console.warn(f"{server} is not used: install bubblewrap, or use sandbox=off")
            return None
        return server

    @property
    def farm(self) -> Farm | None:
        """Return the hosts that share this build, if the server supports a farm."""
        return self.objects.farm if self.objects and self._server else None

    @property
    def build(self) -> str:
        """Return the name of this build in the farm: hosts with equal names can share objects."""
        return farm.build_id(self.recipe.name, self.made_with)

    @functools.cached_property
    def made_with(self) -> dict[str, str]:
        """Return the digests of everything that an object depends on besides its command and headers, by name."""
        headers = self.tree.path, self.environment.site_packages, *object_cache.SYSTEM_HEADERS
        return {
            "its CUDA toolkit or g++": files.digest(dict(self.toolchain.identity)),
            "its locked environment": files.sha256(self.recipe.beside(self.recipe.build.lock)),
            "the names of its headers": object_cache.names(headers),
            "the folder that it is built in": str(self.places["tree"]),
        }


def compile(shop: Workshop, log: Path) -> Built:
    """Compile the tree to a wheel.

    Raises:
        BuildError: the build fails; the first error is printed.
        DiskError: the disk is full, or a file cannot be written.
    """
    try:
        return _compiled(shop, log)
    except OSError as error:
        raise DiskError(shop.recipe.name, log, error) from error


def _compiled(shop: Workshop, log: Path) -> Built:
    shop.prepare()
    recipe, places, folders = shop.recipe, shop.places, shop.folders
    settings = [f"--config-setting={name}={value}" for name, value in recipe.build.config_settings.items()]
    argv: list[str | Path] = [places["environment"] / "bin/python", "-m", "build", "--wheel", "--no-isolation",
            "--skip-dependency-check", *settings, "--outdir", places["dist"], places["tree"]]  # fmt: skip
    log.unlink(missing_ok=True)
    with console.progress(recipe.name) as tell:
        progress = Progress(recipe.name, shop.scheduler, next(iter(shop.logs), None))

        def watch(line: str, usage: Usage) -> None:
            if wrong := options.contradiction(line, recipe.build.env):
                raise BuildError(recipe.name, line, log, wrong)
            tell(progress.see(line, usage))

        try:
            with shop.at_work():
                done = shop.run(argv, log=log, watch=watch)
                if shop.scheduler:
                    shop.scheduler.save()
        except ProgramFailed as error:
            raise BuildError(recipe.name, first_error(log), log, f"status {error.status}") from error
    wheels = list(folders["dist"].glob("*.whl"))
    if len(wheels) != 1:
        raise BuildError(recipe.name, done.output[-500:], log, f"wrote {len(wheels)} wheels instead of one")
    ninja = shop.environment.path / "bin" / "ninja"
    linked = {name: _linked(ninja, folders["tree"], name) for name in recipe.expect.extensions}
    kept = Found()
    for path in shop.logs:
        kept = object_cache.found(path, shop.scheduler.estimates.get(recipe.name) if shop.scheduler else None)
    hosts = shop.farm.compiled_by_host(shop.build) if shop.farm else {}
    return Built(wheels[0], linked, done.usage, kept, hosts)


def booted() -> str:
    """Return the id of this boot; empty if the kernel does not provide one."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return ""


def from_the_future(folder: Path) -> Path | None:
    """Return a file that is newer than now, by the clock of its file system.

    ninja compares times: an object written before the clock was set back is newer than any change and hides it.
    """
    with tempfile.TemporaryFile(dir=folder) as probe:
        now = os.fstat(probe.fileno()).st_mtime + TOLERANCE
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.stat(follow_symlinks=False).st_mtime > now:
                    return Path(entry)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return None


class Progress:
    """The state of a running build, from its output (ninja's ``[n/m]``) and its resource usage."""

    def __init__(self, name: str, scheduler: Scheduler | None = None, log: Path | None = None) -> None:
        self.name = name
        self.scheduler = scheduler
        self.log = log
        """The log of ccache, if it is used."""
        self.found = Found()
        self.work = ProgressState("configuring")

    def see(self, line: str, usage: Usage) -> ProgressState:
        """Read a line of output and return the current state as text."""
        if match := re.match(r"\[(\d+)/(\d+)\] (.*\S)", line):
            target = match[3].split()[-1].rsplit("/", 1)[-1]
            self.work = ProgressState(target, int(match[1]), int(match[2]))
        if not self.scheduler:
            return replace(self.work, memory=usage.now)
        at, there = self.scheduler.status, self.scheduler.available_memory
        beyond = max(0, (self.work.total or 0) - (self.work.done or 0) - at.running - at.waiting - at.remote)
        left = self.scheduler.remaining_seconds(self.name, beyond) if self.work.total else None
        # Show a waiting job only if there is a free slot: then it waits for memory.
        short = at.waiting if at.running < self.scheduler.jobs else 0
        limit = there.limit if there else None
        if self.log and not line:
            self.found = object_cache.found(self.log, None)
        told = replace(
            self.work, memory=usage.now, limit=limit, jobs=at.running, waiting=short, elsewhere=at.remote, left=left
        )
        return replace(told, hits=self.found.hits, misses=self.found.misses) if self.found.hits else told


def first_error(log: Path) -> str:
    """Return the first error of a log and the lines around it, or the last lines if there is none."""
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


def _then(first: str, second: str) -> str:
    return f"{first}; {second}" if first else second


def _packed(source: Path) -> list[Path]:
    """Remove the files that setuptools gathered for the last wheel, so that a file removed from the sources does not
    return.

    If CMake builds in ``build`` itself, as PyTorch's does, ``build/lib`` holds its libraries and stays.
    """
    ours = "build/lib.*" if (source / "build" / "CMakeCache.txt").exists() else "build/lib*"
    return [path for pattern in (ours, "build/bdist*", "*.egg-info") for path in source.glob(pattern)]


def _linked(ninja: Path, source: Path, extension: str) -> int:
    """Return the number of CUDA objects that ninja linked into an extension."""
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
