"""One build: a tree compiled in its environment with its toolchain, watched, logged, and resumable."""

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
"""How gcc, nvcc, cicc, ptxas, ld, CMake and Python begin the line that matters, and what the machine says to them."""
FOLDERS = ("tree", "environment", "toolchain", "dist", "home")
"""What a build is shown, by name; the sandbox decides where."""
PLACE = "place.json"
"""The note in a work folder that says where the build saw its tree."""
ASKING = "asking.json"
"""The note in a work folder that says whether the compilers of its build ask at a scheduler."""
UNSYNCED = "unsynced.json"
"""The note in a work folder that says in which boot of the machine a build began to write what is not synced yet."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
"""What the kernel calls this boot (random(4))."""
TOLERANCE = 2.0
"""Seconds that a file may be later than now: clocks are coarse, some file systems' by as much."""
EXCERPT = 12
"""Lines of the log that are shown around the first error."""


class BuildError(VoltforgeError):
    """A build that ended badly; ``excerpt`` holds the first error and its surroundings, ``log`` the whole."""

    def __init__(self, name: str, excerpt: str, log: Path, why: str) -> None:
        shown = "".join(f"\n  | {line}" for line in excerpt.splitlines())
        super().__init__(
            f"{name} was not built ({why}); the first error:{shown}",
            hint=_then(remedy(excerpt), f"the whole log is {log}; the next run resumes"),
        )
        self.excerpt = excerpt
        self.log = log


class DiskError(VoltforgeError):
    """What the file system refused of a build's folders or its log."""

    def __init__(self, name: str, log: Path, error: OSError) -> None:
        said = error.strerror or error.args[0][0][-1]  # shutil.Error has a list of what it could not copy
        where = error.filename2 or error.filename or log  # a failed write does not say of what
        super().__init__(
            f"{name} was not built: {where}: {said}",
            hint=_then(remedy(said, "see who owns it"), "the next run resumes"),
        )


@dataclass(frozen=True)
class Built:
    """A wheel as the build left it, before it is finished."""

    wheel: Path
    linked: Mapping[str, int]
    """CUDA objects linked into each expected extension."""
    usage: Usage
    found: Found
    """What came from the cache of objects."""
    hosts: Mapping[str, int] = field(default_factory=dict)
    """How many objects each host of a farm compiled."""


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
    # The toolkit has no static runtime; nvcc's temporary files get names that do not carry its process id.
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
    """Where one build happens: all that it is given, and the folder that keeps what it made."""

    recipe: SourceRecipe
    tree: Tree
    environment: Environment
    toolchain: Toolchain
    sandbox: Sandbox
    jobs: int
    work: Path
    """A killed or repeated build goes on here, with the objects of the last one."""
    scheduler: Scheduler | None = None
    """Where its compilers ask for leave; ``jobs`` then bounds those that run at once, not those that ask."""
    objects: Objects | None = None
    """Where objects are that were compiled before; with a scheduler only."""

    @staticmethod
    def can_ask(tree: Tree) -> bool:
        """Whether the compilers of a tree can be made to ask for leave: CMake can do that."""
        return (tree.path / "CMakeLists.txt").is_file()

    @property
    def folders(self) -> dict[str, Path]:
        """The real folders, by the names of :data:`FOLDERS`, and ``scheduler`` and ``cache`` where there are such."""
        real = (self.work / "tree", self.environment.path, self.toolchain.home, self.work / "dist", self.work / "home")
        named = dict(zip(FOLDERS, real, strict=True))
        named |= {"gate": self.scheduler.folder} if self.scheduler else {}
        named |= {"cache": self.objects.folder} if self.objects else {}
        return {name: path.absolute() for name, path in named.items()}

    @functools.cached_property
    def around(self) -> Sandbox:
        """The sandbox; one that cannot show the folders at their fixed places moves them there, if that can be."""
        if self.sandbox.kind != "none":
            return self.sandbox
        system = self.toolchain.origin == "system"  # which may be all of /usr/local, and cannot be linked file by file
        if why := "the CUDA toolkit is the machine's own" if system else sandbox.obstacle(self.work, self.readable):
            where = f"{self.folders['tree']}, not {sandbox.ROOT}/tree ({why})"
            console.note(f"it is built in {where}: elsewhere its bytes may differ")
            return self.sandbox
        return replace(self.sandbox, moves=True)

    @property
    def writable(self) -> dict[str, Path]:
        """The real folders that the build may write."""
        return {
            name: path for name, path in self.folders.items() if name in ("tree", "dist", "home", *self._shown("cache"))
        }

    @property
    def readable(self) -> dict[str, Path]:
        """The real folders that it may read."""
        shown = "environment", "toolchain", *self._shown("gate")
        return {name: path for name, path in self.folders.items() if name in shown}

    def _shown(self, name: str) -> tuple[str, ...]:
        """What is no part of the build stays where it is if no sandbox shows it elsewhere: others may use it."""
        return () if self.sandbox.kind == "none" else (name,)

    @property
    def places(self) -> dict[str, Path]:
        """Where the build sees them."""
        shown = {**self.readable, **self.writable}
        return {name: self.around.place(name, path) if name in shown else path for name, path in self.folders.items()}

    def prepare(self) -> None:
        """Bring the sources in, and take out what the last build packed."""
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
        """Where ccache says what it does, if it is asked."""
        return [self.objects.log(self.recipe.name)] if self.objects else []

    def _begin_afresh_if_need_be(self) -> None:
        """Empty the work folder where ninja or CMake would be wrong about what is in it."""
        self.work.mkdir(parents=True, exist_ok=True)
        place = str(self.places["tree"])
        built = files.read_json(self.work / PLACE) or place
        unsynced = files.read_json(self.work / UNSYNCED)
        if unsynced not in (None, booted()):
            why = "the machine went down while it was built: what was written last may be cut short"
        elif late := from_the_future(self.work):
            why = f"{late.relative_to(self.work)} is of a later time than now: the clock was set back"
        elif built != place:
            why = f"CMake's notes are of a build in {built}"
        elif (self.work / PLACE).exists() and (files.read_json(self.work / ASKING) or False) != bool(self.scheduler):
            why = "its compilers do not ask for leave as they would now"  # some build systems configure once only
        else:
            return
        console.note(f"begins afresh, for {why}")
        files.remove(self.work)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Around a build: what it leaves is on the disk when this ends, however it ends but by a crash."""
        files.write_json(self.work / UNSYNCED, booted())
        try:
            yield
        finally:
            os.sync()
            (self.work / UNSYNCED).unlink(missing_ok=True)

    def run(
        self, argv: Sequence[str | Path], *, log: Path, watch: Callable[[str, Usage], None] | None = None
    ) -> Completed:
        """Run a program in the tree as the build sees it, with the build's variables and no others.

        Raises:
            ProgramFailed: it failed.
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
        """What makes compilers ask for leave, and for objects that are there: a program before all, and variables."""
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
        """The server of objects, if the build can be led there."""
        server = self.objects.server if self.objects else None
        if server and not self.around.hermetic and self.around.kind != "none":
            console.warn(f"{server} is not asked: without bubblewrap nothing leads there but sandbox=off")
            return None
        return server

    @property
    def farm(self) -> Farm | None:
        """The hosts that build with this one, if there may be any."""
        return self.objects.farm if self.objects and self._server else None

    @property
    def build(self) -> str:
        """What they call this build: hosts with the same name for it have objects for each other."""
        return farm.build_id(self.recipe.name, self.made_with)

    @functools.cached_property
    def made_with(self) -> dict[str, str]:
        """What an object depends on besides its command and the headers that it reads: digests, by what they are of."""
        headers = self.tree.path, self.environment.site_packages, *object_cache.SYSTEM_HEADERS
        return {
            "its CUDA toolkit or g++": files.digest(dict(self.toolchain.identity)),
            "its locked environment": files.sha256(self.recipe.beside(self.recipe.build.lock)),
            "the names of its headers": object_cache.names(headers),
            "the folder that it is built in": str(self.places["tree"]),
        }


def compile(shop: Workshop, log: Path) -> Built:
    """Compile the tree of a workshop to a wheel.

    Raises:
        BuildError: it failed; the first error is shown, the log named.
        DiskError: the disk is full, or something may not be written.
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
        raise BuildError(recipe.name, done.output[-500:], log, f"left {len(wheels)} wheels where one was expected")
    ninja = shop.environment.path / "bin" / "ninja"
    linked = {name: _linked(ninja, folders["tree"], name) for name in recipe.expect.extensions}
    kept = Found()
    for path in shop.logs:
        kept = object_cache.found(path, shop.scheduler.estimates.get(recipe.name) if shop.scheduler else None)
    hosts = shop.farm.compiled_by_host(shop.build) if shop.farm else {}
    return Built(wheels[0], linked, done.usage, kept, hosts)


def booted() -> str:
    """This boot of the machine; empty where the kernel does not say."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return ""


def from_the_future(folder: Path) -> Path | None:
    """Something in a folder that is later than now by the file system's own clock, which may be another machine's.

    ninja compares times: an object from before the clock was set back is later than any change, and hides it.
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
    """What is known of a build that goes on, from the lines that it prints (ninja's ``[n/m]``) and what it uses."""

    def __init__(self, name: str, scheduler: Scheduler | None = None, log: Path | None = None) -> None:
        self.name = name
        self.scheduler = scheduler
        self.log = log
        """What ccache says that it does, if it is asked."""
        self.found = Found()
        self.work = ProgressState("configuring")

    def see(self, line: str, usage: Usage) -> ProgressState:
        """Take a line in and give all that is known now."""
        if match := re.match(r"\[(\d+)/(\d+)\] (.*\S)", line):
            target = match[3].split()[-1].rsplit("/", 1)[-1]
            self.work = ProgressState(target, int(match[1]), int(match[2]))
        if not self.scheduler:
            return replace(self.work, memory=usage.now)
        at, there = self.scheduler.status, self.scheduler.available_memory
        beyond = max(0, (self.work.total or 0) - (self.work.done or 0) - at.running - at.waiting - at.remote)
        left = self.scheduler.remaining_seconds(self.name, beyond) if self.work.total else None
        # Who waits is told where a place is free: then it is for memory.
        short = at.waiting if at.running < self.scheduler.jobs else 0
        limit = there.limit if there else None
        if self.log and not line:
            self.found = object_cache.found(self.log, None)
        told = replace(
            self.work, memory=usage.now, limit=limit, jobs=at.running, waiting=short, elsewhere=at.remote, left=left
        )
        return replace(told, hits=self.found.hits, misses=self.found.misses) if self.found.hits else told


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


def _then(first: str, second: str) -> str:
    return f"{first}; {second}" if first else second


def _packed(source: Path) -> list[Path]:
    """What setuptools gathered for the last wheel; a file that is gone from the sources would come back from there.

    Where CMake builds in ``build`` itself, as PyTorch's does, ``build/lib`` has its libraries and stays.
    """
    ours = "build/lib.*" if (source / "build" / "CMakeCache.txt").exists() else "build/lib*"
    return [path for pattern in (ours, "build/bdist*", "*.egg-info") for path in source.glob(pattern)]


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
