"""vLLM compiled by one slow host, by three such hosts, and by three of which one is killed in the middle.

The hosts are network namespaces of this machine, each in a control group that gives it a share of a core (as root).
alpha keeps the objects (redis, with a password) and is joined to beta and gamma by a link each, and to nothing else. It
builds; the others help (``./doit farm:help``). In the last round gamma is killed once it has compiled a few objects.
All are this checkout, with the environment and the toolkit that its own build has: ``./doit wheels:vllm`` comes first,
and its wheel is what the others are compared with. What all of them said is in build/bench/farm.txt.
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
"""By name, where each finds the server."""
ROUNDS = ("alone", "farm", "killed")
STAGES = ("toolchain", "fetch-vllm", "tree-vllm", "environment-vllm")


def ip(*words):
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def network():
    """The three namespaces, and the links from the first to the others."""
    spaces = {name: f"vf-{os.getpid()}-{name}" for name in HOSTS}
    made = []
    try:
        for space in spaces.values():
            ip("netns", "add", space)
            made.append(space)
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
        for space in made:
            ip("netns", "delete", space)


def checkout(pipeline, root):
    """This checkout once more, at ``root``, with its stages up to the environment."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "build" / "stages").mkdir(parents=True)
    for name in ("toolchains", "downloads"):
        (root / "build" / name).symlink_to(pipeline.scratch / name)
    for stage in STAGES:
        shutil.copy(pipeline.record(stage), root / "build" / "stages")
    return root


class Host:
    """One of the three at work; what it says goes to the terminal and to the transcript, with its name before it."""

    def __init__(self, name, space, group, root, words, transcript):
        self.name, self.group = name, group
        enter = ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name]
        environ = {**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(root)}
        self.child = subprocess.Popen(
            [*enter, *words], cwd=root, env=environ, start_new_session=True, text=True, preexec_fn=group.enter,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.reader = threading.Thread(target=self.read, args=(transcript,), daemon=True)
        self.reader.start()

    def read(self, transcript):
        for line in self.child.stdout:
            transcript(f"{self.name:5} | {line.rstrip()}")

    def end(self):
        """Kill it with all that it started."""
        self.group.end()
        self.child.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", default=",".join(ROUNDS), help="which of them (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.6, help="cores of each host (default: %(default)s)")
    parser.add_argument("--jobs", default="1", help="compile jobs of each host (default: %(default)s)")
    parser.add_argument("--kill-after", type=int, default=3, metavar="N", help="objects that gamma may compile")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench" / "farm.json", help="where figures go")
    words = parser.parse_args()
    pipeline = Pipeline.load(ROOT, Settings())
    stage = pipeline.package(pipeline.recipes["vllm"]).stages["build"]
    if not stage.current():
        sys.exit("x this checkout has no wheel of vLLM to compare with\n  try: ./doit wheels:vllm")
    wheel = stage.result().sha256
    words.json.parent.mkdir(parents=True, exist_ok=True)
    figures = {"share": words.share, "jobs": int(words.jobs), "wheel": wheel, "rounds": {}}
    with words.json.with_suffix(".txt").open("w") as log:
        for name in words.rounds.split(","):
            console.step(f"{name}: {words.share} of a core each")
            print(f"--- {name} ---", file=log)
            figures["rounds"][name] = built(pipeline, words, log, helped=name != "alone", killed=name == "killed")
            files.write_json(words.json, json.loads(json.dumps(figures)))
    sys.exit(not report(figures))


def built(pipeline, words, log, *, helped, killed):
    """One round: seconds until alpha has the wheel, who compiled how many objects, and the wheels' digests."""
    password, begin = secrets.token_hex(8), time.monotonic()

    def transcript(line):
        stamped = f"{time.monotonic() - begin:6.1f} {line.replace(password, '***')}"
        print(stamped, flush=True)
        print(stamped, file=log, flush=True)

    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=pipeline.scratch))
        spaces = stack.enter_context(network())
        names = [*HOSTS] if helped else ["alpha"]
        groups = {name: stack.enter_context(slowed(words.share)) for name in names}
        roots = {name: checkout(pipeline, Path(scratch, name)) for name in names}
        redis = ["redis-server", "--port", str(PORT), "--requirepass", password, "--save", "", "--dir", scratch]
        server = subprocess.Popen(["ip", "netns", "exec", spaces["alpha"], *redis], stdout=subprocess.DEVNULL)
        looks = ["ip", "netns", "exec", spaces["alpha"], "redis-cli", "--no-auth-warning", "-a", password]
        hosts, figures = {}, {}
        try:
            time.sleep(1)
            begin = time.monotonic()
            for name in reversed(names):
                address = f"redis://:{password}@{HOSTS[name]}:{PORT}"
                task = "build:vllm" if name == "alpha" else "farm:help"
                doit = [sys.executable, "-m", "doit", f"ccache={address}", f"jobs={words.jobs}", task]
                hosts[name] = Host(name, spaces[name], groups[name], roots[name], doit, transcript)
            while hosts["alpha"].child.poll() is None:
                time.sleep(0.5)
                if killed and "killed" not in figures and compiled(looks).count("gamma") >= words.kill_after:
                    figures["killed"] = round(time.monotonic() - begin)
                    transcript("gamma | (killed)")
                    hosts["gamma"].end()
            figures["wall"] = round(time.monotonic() - begin)
            told = time.monotonic() + 300
            whole = [name for name in names if not (killed and name == "gamma")]
            records = {name: roots[name] / "build" / "stages" / "build-vllm.json" for name in whole}
            while not all(path.exists() for path in records.values()) and time.monotonic() < told:
                time.sleep(0.5)
            by = compiled(looks)
            held = subprocess.run([*looks, "info", "memory"], capture_output=True, text=True, check=True).stdout
            figures["redis"] = int(held.split("used_memory:")[1].split()[0])
            figures["compiled"] = {name: by.count(name) for name in names}
            results = {name: files.read_json(path)["results"] for name, path in records.items()}
            figures["wheels"] = {name: one["sha256"] for name, one in results.items()}
            figures["cpu"] = {name: round(one["usage"]["cpu"]) for name, one in results.items()}
        finally:
            for host in hosts.values():
                host.end()
            server.kill()
            server.wait()
    return figures


def report(figures):
    """Print the table; whether all is as it should be."""
    rounds, rows, good = figures["rounds"], [], True
    for name, one in rounds.items():
        same = set(one["wheels"].values()) == {figures["wheel"]}
        good = good and same and ("killed" in one) == (name == "killed")
        who = ", ".join(f"{host} {count}" for host, count in one["compiled"].items())
        times = f"{rounds['alone']['wall'] / one['wall']:.2f}" if "alone" in rounds else ""
        rows.append((name, f"{one['wall']} s", times, who, "the same" if same else "NOT the same"))
    title = f"vLLM, hosts of {figures['share']} of a core, {figures['jobs']} jobs each"
    console.table(title, ("round", "alpha has the wheel after", "times faster", "compiled", "wheels"), rows)
    for name, one in rounds.items():
        if "killed" in one:
            console.note(f"{name}: gamma was killed after {one['killed']} s")
        console.note(f"{name}: {files.size(one['redis'])} in redis; seconds of processor time: {one['cpu']}")
    return good


def compiled(looks):
    """The hosts that compiled the objects there are, one for each object."""

    def ask(*words):
        return subprocess.run([*looks, *words], capture_output=True, text=True, check=True).stdout.split()

    return [name for key in ask("keys", f"{farm.PREFIX}:*:") for name in ask("hvals", key)]


if __name__ == "__main__":
    main()
