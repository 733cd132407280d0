"""Compare three builds of vLLM: by one slow host, by three slow hosts, and by three of which one is killed.

The hosts are network namespaces of this machine. Each has a control group with a share of a core, which takes root.
alpha runs redis, which keeps the objects, and has a link to beta and a link to gamma. alpha builds vLLM, and the
others run ``./doit farm:help``. In the last round gamma is killed after it has compiled a few objects.

All hosts are copies of this checkout with its toolkit and environment. Build a wheel first, to compare with:
``./doit wheels:vllm``. The output of all hosts is in build/bench/farm.txt.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.cgroup import slowed
from voltforge.compile import farm
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console, files

PORT = 6379
HOSTS = {"alpha": "127.0.0.1", "beta": "10.77.1.1", "gamma": "10.77.2.1"}
"""The address of the redis server for each host."""
ROUNDS = ("alone", "farm", "killed")
STAGES = ("toolchain", "driver-stub", "fetch:vllm", "tree:vllm", "environment:vllm")
"""Stages whose results the copies take from this checkout."""
SHARED = ("toolchains", "driver-stub", "downloads", "trees", "environments")
"""Folders of build/ with these results."""
BUILD_RECORD = Path("build", "stages", "build-vllm.json")
FINISH_TIMEOUT = 300
"""Seconds that the helping hosts have for their wheels once alpha has its own."""


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


@contextlib.contextmanager
def network():
    """Yield the three network namespaces by host; alpha has a link to each of the others."""
    spaces = {name: f"vf-{os.getpid()}-{name}" for name in HOSTS}
    created = []
    try:
        for space in spaces.values():
            ip("netns", "add", space)
            created.append(space)
            ip("-n", space, "link", "set", "lo", "up")
        for number, name in enumerate(("beta", "gamma"), 1):
            near, far = f"vf{os.getpid() % 10**6}a{number}", f"vf{os.getpid() % 10**6}b{number}"
            ip(
                "link",
                "add",
                near,
                "netns",
                spaces["alpha"],
                "type",
                "veth",
                "peer",
                "name",
                far,
                "netns",
                spaces[name],
            )
            for space, link, address in ((spaces["alpha"], near, 1), (spaces[name], far, 2)):
                ip("-n", space, "address", "add", f"10.77.{number}.{address}/30", "dev", link)
                ip("-n", space, "link", "set", link, "up")
        yield spaces
    finally:
        for space in created:
            ip("netns", "delete", space)


def copy_checkout(pipeline, root):
    """Copy this checkout to ``root``, with its stages up to the environment."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listing.split("\0")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "build" / "stages").mkdir(parents=True)
    for name in SHARED:
        (root / "build" / name).symlink_to(pipeline.scratch / name)
    for record in filter(Path.exists, map(pipeline.record, STAGES)):
        shutil.copy(record, root / "build" / "stages")
    return root


class Host:
    """A process on one of the hosts. Its output goes to the log, after the name of the host."""

    def __init__(self, name, space, group, root, command, log):
        self.name, self.group = name, group
        enter = ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name]
        environ = {**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(root)}
        self.child = subprocess.Popen(
            [*enter, *command], cwd=root, env=environ, start_new_session=True, text=True, preexec_fn=group.enter,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        threading.Thread(target=self.read, args=(log,), daemon=True).start()

    def read(self, log):
        for line in self.child.stdout:
            log(f"{self.name:5} | {line.rstrip()}")

    def kill(self):
        """Kill the process with all its children."""
        self.group.end()
        self.child.wait()


class Redis:
    """A redis server on alpha."""

    def __init__(self, space, password, folder):
        self.enter = ["ip", "netns", "exec", space]
        self.client = [*self.enter, "redis-cli", "--no-auth-warning", "-a", password]
        options = ["--port", str(PORT), "--requirepass", password, "--save", "", "--dir", folder]
        self.server = subprocess.Popen([*self.enter, "redis-server", *options], stdout=subprocess.DEVNULL)

    def ask(self, *command):
        return subprocess.run([*self.client, *command], capture_output=True, text=True, check=True).stdout

    def compilers(self):
        """Return the host of each compiled object."""
        keys = self.ask("keys", f"{farm.PREFIX}:*:").split()
        return [host for key in keys for host in self.ask("hvals", key).split()]

    def used_memory(self):
        """Return the bytes that the server holds."""
        return int(self.ask("info", "memory").split("used_memory:")[1].split()[0])

    def kill(self):
        self.server.kill()
        self.server.wait()


def build(pipeline, options, log_file, *, helped, killed):
    """Run one round and return its figures: seconds, compiled objects by host, and the digests of the wheels."""
    password, begin = secrets.token_hex(8), time.monotonic()

    def log(line):
        stamped = f"{time.monotonic() - begin:6.1f} {line.replace(password, '***')}"
        print(stamped, flush=True)
        print(stamped, file=log_file, flush=True)

    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=pipeline.scratch))
        spaces = stack.enter_context(network())
        names = [*HOSTS] if helped else ["alpha"]
        groups = {name: stack.enter_context(slowed(options.share)) for name in names}
        roots = {name: copy_checkout(pipeline, Path(scratch, name)) for name in names}
        redis, hosts, figures = Redis(spaces["alpha"], password, scratch), {}, {}
        try:
            time.sleep(1)
            begin = time.monotonic()
            for name in reversed(names):
                address = f"redis://:{password}@{HOSTS[name]}:{PORT}"
                task = "build:vllm" if name == "alpha" else "farm:help"
                doit = [sys.executable, "-m", "doit", f"ccache={address}", f"jobs={options.jobs}", task]
                hosts[name] = Host(name, spaces[name], groups[name], roots[name], doit, log)
            while hosts["alpha"].child.poll() is None:
                time.sleep(0.5)
                if killed and "killed" not in figures and redis.compilers().count("gamma") >= options.kill_after:
                    figures["killed"] = round(time.monotonic() - begin)
                    log("gamma | (killed)")
                    hosts["gamma"].kill()
            figures["wall"] = round(time.monotonic() - begin)
            alive = [name for name in names if not (killed and name == "gamma")]
            records = {name: roots[name] / BUILD_RECORD for name in alive}
            deadline = time.monotonic() + FINISH_TIMEOUT
            while not all(path.exists() for path in records.values()) and time.monotonic() < deadline:
                time.sleep(0.5)
            compilers = redis.compilers()
            results = {name: files.read_json(path)["results"] for name, path in records.items()}
            figures["redis"] = redis.used_memory()
            figures["compiled"] = {name: compilers.count(name) for name in names}
            figures["wheels"] = {name: result["sha256"] for name, result in results.items()}
            figures["cpu"] = {name: round(result["usage"]["cpu"]) for name, result in results.items()}
        finally:
            for host in hosts.values():
                host.kill()
            redis.kill()
    return figures


def report(figures):
    """Print the table. Return true if all wheels are equal and gamma was killed in the last round only."""
    rounds, rows, good = figures["rounds"], [], True
    for name, result in rounds.items():
        equal = set(result["wheels"].values()) == {figures["wheel"]}
        good = good and equal and ("killed" in result) == (name == "killed")
        compiled = ", ".join(f"{host} {count}" for host, count in result["compiled"].items())
        speedup = f"{rounds['alone']['wall'] / result['wall']:.2f}" if "alone" in rounds else ""
        rows.append((name, f"{result['wall']} s", speedup, compiled, "equal" if equal else "DIFFERENT"))
    title = f"vLLM on hosts with {figures['share']} of a core and {figures['jobs']} jobs each"
    console.table(title, ("round", "time until alpha has the wheel", "speedup", "compiled", "wheels"), rows)
    for name, result in rounds.items():
        if "killed" in result:
            console.note(f"{name}: gamma was killed after {result['killed']} s")
        console.note(f"{name}: {files.size(result['redis'])} in redis; CPU seconds by host: {result['cpu']}")
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", default=",".join(ROUNDS), help="the rounds to run (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.6, help="cores of each host (default: %(default)s)")
    parser.add_argument("--jobs", default="1", help="compile jobs of each host (default: %(default)s)")
    parser.add_argument("--kill-after", type=int, default=3, metavar="N", help="kill gamma after N compiled objects")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench" / "farm.json", help="output file")
    options = parser.parse_args()
    pipeline = Pipeline.load(ROOT, Settings())
    stage = pipeline.package(pipeline.recipes["vllm"]).stages["build"]
    if not stage.current():
        sys.exit("x this checkout has no wheel of vLLM to compare with\n  try: ./doit wheels:vllm")
    wheel = stage.result().sha256
    options.json.parent.mkdir(parents=True, exist_ok=True)
    figures = {"share": options.share, "jobs": int(options.jobs), "wheel": wheel, "rounds": {}}
    with options.json.with_suffix(".txt").open("w") as log_file:
        for name in options.rounds.split(","):
            console.step(f"{name}: {options.share} of a core for each host")
            print(f"--- {name} ---", file=log_file)
            figures["rounds"][name] = build(
                pipeline, options, log_file, helped=name != "alone", killed=name == "killed"
            )
            files.write_json(options.json, json.loads(json.dumps(figures)))
    sys.exit(not report(figures))


if __name__ == "__main__":
    main()
