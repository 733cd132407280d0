"""One build: compile a tree in its environment with its toolchain; watched, logged and resumable."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from voltforge.compile import build_variables, cache_stats, farm, fixed_paths, object_cache, work_folder
from voltforge.compile.build_log import BuildProgress, first_error
from voltforge.compile.cache_stats import CacheStats
from voltforge.compile.farm import Farm
from voltforge.compile.object_cache import ObjectCache, ObjectServer
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


class BuildError(VoltforgeError):
    """A build failed. ``excerpt`` is the first error and the lines around it, ``log`` the path of the whole log."""

    def __init__(self, name: str, excerpt: str, log: Path, why: str) -> None:
        shown = "".join(f"\n  | {line}" for line in excerpt.splitlines())
        super().__init__(
            f"{name} was not built ({why}). From the log:{shown}",
            hint=_then(remedy(excerpt), f"the whole log is {log}; the next run resumes"),
        )
        self.excerpt = excerpt
        self.log = log


class DiskError(VoltforgeError):
    """The file system refused to write a build's folders or its log."""

    def __init__(self, name: str, log: Path, error: OSError) -> None:
        reason = error.strerror or error.args[0][0][-1]  # shutil.Error has a list of the files that were not copied
        path = error.filename2 or error.filename or log  # a failed write has no file name
        super().__init__(
            f"{name} was not built: {path}: {reason}",
            hint=_then(remedy(reason, "check who owns it"), "the next run resumes"),
        )


@dataclass(frozen=True)
class Built:
    """A wheel as the build wrote it, not yet finished."""

    wheel: Path
    linked: Mapping[str, int]
    """The number of CUDA objects linked into each expected extension."""
    usage: Usage
    cache_stats: CacheStats
    hosts: Mapping[str, int] = field(default_factory=dict)
    """The number of objects that each host of a farm compiled."""


@dataclass(frozen=True)
class Build:
    """The inputs, the tools and the folders of one build."""

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
    cache: ObjectCache | None = None
    """The cache of compiled objects; requires a scheduler."""

    @staticmethod
    def can_be_scheduled(tree: Tree) -> bool:
        """Return True if a scheduler can start the compilers of a tree: CMake runs them by a launcher."""
        return (tree.path / "CMakeLists.txt").is_file()

    @property
    def folders(self) -> dict[str, Path]:
        """The real folders, by the names of :data:`~voltforge.compile.build_variables.FOLDERS`.

        ``gate``, the folder of the scheduler, and ``cache`` are among them if they are used.
        """
        real = (self.work / "tree", self.environment.path, self.toolchain.home, self.work / "dist", self.work / "home")
        named = dict(zip(build_variables.FOLDERS, real, strict=True))
        named |= {"gate": self.scheduler.folder} if self.scheduler else {}
        named |= {"cache": self.cache.folder} if self.cache else {}
        return {name: path.absolute() for name, path in named.items()}

    @functools.cached_property
    def effective_sandbox(self) -> Sandbox:
        """The sandbox; without namespaces it moves the folders to their fixed paths if that is possible."""
        if self.sandbox.kind != "none":
            return self.sandbox
        if self.toolchain.origin == "system":  # it can be all of /usr/local, which cannot be linked file by file
            obstacle = "the CUDA toolkit belongs to the machine"
        else:
            obstacle = fixed_paths.obstacle(self.work, self.readable)
        if obstacle:
            where = f"{self.folders['tree']}, not {fixed_paths.ROOT}/tree ({obstacle})"
            console.note(f"building in {where}: the bytes can differ in other folders")
            return self.sandbox
        return replace(self.sandbox, moves=True)

    @property
    def writable(self) -> dict[str, Path]:
        """The real folders that the build can write and that the sandbox shows."""
        return self._mapped("tree", "dist", "home", shared="cache")

    @property
    def readable(self) -> dict[str, Path]:
        """The real folders that the build can only read and that the sandbox shows."""
        return self._mapped("environment", "toolchain", shared="gate")

    def _mapped(self, *own: str, shared: str) -> dict[str, Path]:
        """Return the folders ``own`` of the build, and ``shared`` if the sandbox can map it.

        Without namespaces a shared folder stays where it is, because other builds use it.
        """
        names = own if self.sandbox.kind == "none" else (*own, shared)
        return {name: path for name, path in self.folders.items() if name in names}

    @property
    def places(self) -> dict[str, Path]:
        """The paths at which the build sees the folders."""
        mapped, place = {**self.readable, **self.writable}, self.effective_sandbox.place
        return {name: place(name, path) if name in mapped else path for name, path in self.folders.items()}

    @property
    def logs(self) -> list[Path]:
        """The log of ccache, if it is used."""
        return [self.cache.log(self.recipe.name)] if self.cache else []

    def prepare(self) -> None:
        """Copy the sources in, and remove the files that the last build packed."""
        fixed_paths.recover(self.work)
        tree, scheduled = self.places["tree"], bool(self.scheduler)
        work_folder.empty_if_stale(self.work, tree, scheduled=scheduled)
        folders = self.folders
        for name in ("tree", "home"):
            folders[name].mkdir(parents=True, exist_ok=True)
        sync(self.tree.path, folders["tree"])
        for stale in [folders["dist"], *self.logs, *work_folder.setuptools_leftovers(folders["tree"])]:
            files.remove(stale)
        folders["dist"].mkdir()
        work_folder.record(self.work, tree, scheduled=scheduled)

    def run(
        self, argv: Sequence[str | Path], *, log: Path, watch: Callable[[str, Usage], None] | None = None
    ) -> Completed:
        """Run a program in the tree, in the sandbox, with the variables of the build only.

        Raises:
            ProgramFailed: the program fails.
        """
        sandbox, places = self.effective_sandbox, self.places
        variables = build_variables.variables(self.recipe, self.tree, self.toolchain, places)
        prefix, job_variables = self._job_control(places)
        words = sandbox.command([*prefix, *argv], writable=self.writable, readable=self.readable, cwd=places["tree"])
        cwd = places["tree"] if sandbox.kind == "none" else self.folders["tree"]
        membership = self.farm.register(self.recipe.name, self.made_with) if self.farm else contextlib.nullcontext()
        with sandbox.in_place(self.writable, self.readable), membership:
            return run(words, cwd=cwd, env=variables | job_variables, log=log, watch=watch)

    def _job_control(self, places: Mapping[str, Path]) -> tuple[list[str | Path], dict[str, str]]:
        """Start the scheduler. Return the words before the command, and the variables of jobs, launcher and ccache."""
        if not self.scheduler:
            return [], {"MAX_JOBS": str(self.jobs), "CMAKE_BUILD_PARALLEL_LEVEL": str(self.jobs)}
        self.scheduler.start(self.farm)
        python, ninja_jobs = places["environment"] / "bin" / "python", str(self.scheduler.ninja_jobs)
        variables = self.scheduler.variables(self.recipe.name, places["gate"], python)
        variables |= {"MAX_JOBS": ninja_jobs, "CMAKE_BUILD_PARALLEL_LEVEL": ninja_jobs}
        if not self.cache:
            return [], variables
        prefix: list[str | Path] = []
        server = self._server
        storage = server.remote_storage(server.host, server.port) if server else ""
        if server and self.effective_sandbox.hermetic:
            self.cache.forward(self.scheduler.folder)
            tunnel = places["gate"] / object_cache.TUNNEL.name
            prefix = [python, "-I", "-S", tunnel, str(object_cache.PORT), places["gate"] / object_cache.SOCKET]
            storage = server.remote_storage("127.0.0.1", object_cache.PORT)
        variables |= {"VOLTFORGE_BUILD": self.build_id} if self.farm else {}
        inputs = files.digest(self.made_with)
        return prefix, variables | self.cache.variables(self.recipe.name, inputs, places["cache"], storage)

    @functools.cached_property
    def _server(self) -> ObjectServer | None:
        """The server of the object cache, if the build can reach it."""
        server = self.cache.server if self.cache else None
        # Only bubblewrap's builds get the tunnel; a build without namespaces has the network of the machine.
        if server and self.effective_sandbox.kind == "no network":
            console.warn(f"{server} is not used: install bubblewrap, or use sandbox=off")
            return None
        return server

    @property
    def farm(self) -> Farm | None:
        """The hosts that share this build, if the server supports a farm."""
        return self.cache.farm if self.cache and self._server else None

    @property
    def build_id(self) -> str:
        """The identifier of this build in the farm: hosts with equal identifiers can share objects."""
        return farm.build_id(self.recipe.name, self.made_with)

    @functools.cached_property
    def made_with(self) -> dict[str, str]:
        """The digests of everything that an object depends on besides its command and headers, by description."""
        headers = self.tree.path, self.environment.site_packages, *object_cache.SYSTEM_HEADERS
        return {
            "its CUDA toolkit or g++": files.digest(dict(self.toolchain.identity)),
            "its locked environment": files.sha256(self.recipe.beside(self.recipe.build.lock)),
            "the names of its headers": object_cache.header_names_digest(headers),
            "the folder that it is built in": str(self.places["tree"]),
        }

    def compile(self, log: Path) -> Built:
        """Compile the tree to a wheel.

        Raises:
            BuildError: the build fails; it has the first error.
            DiskError: the disk is full, or a file cannot be written.
        """
        try:
            self.prepare()
            return self._built(self._run_build(log), log)
        except OSError as error:
            raise DiskError(self.recipe.name, log, error) from error

    def _run_build(self, log: Path) -> Completed:
        """Run the build backend, with its progress on the terminal.

        Raises:
            BuildError: it fails, or an option of the recipe has no effect.
        """
        recipe, places = self.recipe, self.places
        settings = [f"--config-setting={name}={value}" for name, value in recipe.build.config_settings.items()]
        argv: list[str | Path] = [places["environment"] / "bin/python", "-m", "build", "--wheel", "--no-isolation",
                "--skip-dependency-check", *settings, "--outdir", places["dist"], places["tree"]]  # fmt: skip
        log.unlink(missing_ok=True)
        with console.progress(recipe.name) as show:
            progress = BuildProgress(recipe.name, self.scheduler, next(iter(self.logs), None))

            def watch(line: str, usage: Usage) -> None:
                if contradiction := options.contradiction(line, recipe.build.env):
                    raise BuildError(recipe.name, line, log, contradiction)
                show(progress.see(line, usage))

            try:
                with work_folder.synced(self.work):
                    completed = self.run(argv, log=log, watch=watch)
                    if self.scheduler:
                        self.scheduler.save()
            except ProgramFailed as error:
                raise BuildError(recipe.name, first_error(log), log, f"status {error.status}") from error
        return completed

    def _built(self, completed: Completed, log: Path) -> Built:
        """Return the wheel that the build wrote, and its figures.

        Raises:
            BuildError: there is not exactly one wheel.
        """
        recipe, folders = self.recipe, self.folders
        wheels = list(folders["dist"].glob("*.whl"))
        if len(wheels) != 1:
            raise BuildError(recipe.name, completed.output[-500:], log, f"wrote {len(wheels)} wheels instead of one")
        ninja = self.environment.path / "bin" / "ninja"
        linked = {name: _linked_cuda_objects(ninja, folders["tree"], name) for name in recipe.expect.extensions}
        stats = CacheStats()
        for path in self.logs:
            estimates = self.scheduler.estimates.get(recipe.name) if self.scheduler else None
            stats = cache_stats.read(path, estimates)
        hosts = self.farm.compiled_by_host(self.build_id) if self.farm else {}
        return Built(wheels[0], linked, completed.usage, stats, hosts)


def _then(first: str, second: str) -> str:
    return f"{first}; {second}" if first else second


def _linked_cuda_objects(ninja: Path, source: Path, extension: str) -> int:
    """Return the number of CUDA objects that ninja linked into an extension."""
    name, count = Path(extension).name, 0
    for script in source.rglob("build.ninja"):
        targets = _ninja_tool(ninja, script, "targets", "all")
        for target in {line.rsplit(": ", 1)[0] for line in targets if line.rsplit(": ", 1)[0].endswith(name)}:
            inputs = {line.strip() for line in _ninja_tool(ninja, script, "query", target)}
            count = max(count, sum(line.endswith(".cu.o") for line in inputs))
    return count


def _ninja_tool(ninja: Path, script: Path, *words: str) -> Sequence[str]:
    """Return the lines that ``ninja -t`` prints for a build script."""
    return run([os.path.realpath(ninja), "-C", script.parent, "-t", *words]).output.splitlines()
