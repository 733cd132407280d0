"""The first `./doit` makes .venv with uv, or with pip where uv is not to be had."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import samples
from tests.support.command_checkout import CommandCheckout
from voltforge.commands import bootstrap
from voltforge.system import files


def fake_python(folder: Path, version: str) -> Path:
    """A program that says that it is another Python. A fake: not every machine has an old one."""
    folder.mkdir(exist_ok=True)
    (folder / "python3").write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {version}" || exit 1\n')
    (folder / "python3").chmod(0o755)
    return folder


def only(folder: Path, *programs: str) -> Path:
    """A folder for PATH with these programs of the machine."""
    folder.mkdir(exist_ok=True)
    for program in programs:
        (folder / program).symlink_to(shutil.which(program) or program)
    return folder


def test_unsupported_pythons_are_listed_with_a_remedy(bare, tmp_path):
    tools = only(fake_python(tmp_path / "bin", "3.8.20"), "dirname", "readlink", "cmp", "cp")
    bare.env["PATH"] = str(tools)
    done = bare.doit("list")
    assert (done.returncode, done.stdout) == (1, "")
    assert "needs Python 3.10 to 3.13" in done.stderr
    assert f"{tools / 'python3'}: Python 3.8.20" in done.stderr
    assert "try: apt-get install" in done.stderr
    assert not (bare.root / ".venv").exists()


def test_a_requested_python_is_never_replaced_silently(bare, tmp_path):
    wrong = fake_python(tmp_path / "bin", "3.14.1") / "python3"
    bare.env["VOLTFORGE_PYTHON"] = str(wrong)
    done = bare.doit("list")
    assert done.returncode == 1
    assert f"{wrong}: Python 3.14.1" in done.stderr
    assert not (bare.root / ".venv").exists()


@pytest.fixture
def stocked(bare, tmp_path) -> CommandCheckout:
    """One whose requirements are a single wheel on the disk: a doit that says so. A fake, for the real are many MB."""
    entry = bare.root / "voltforge" / "commands" / "__main__.py"
    entry.write_text("import sys, doit; print('doit was given', sys.argv[1:])\n")
    shelf = tmp_path / "shelf"
    path = samples.wheel(shelf, {"doit/__init__.py": ""}, name="doit", version="0.37.0")
    (bare.root / "requirements.txt").write_text(f"doit==0.37.0 --hash=sha256:{files.sha256(path)}\n")
    own = ("PIP_", "UV_")
    bare.env = {key: value for key, value in bare.env.items() if not key.startswith(own)}
    bare.env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(shelf)}
    bare.env["VOLTFORGE_PYTHON"] = sys.executable
    return bare


@pytest.mark.slow
def test_the_first_call_makes_the_environment_and_the_second_only_runs(stocked):
    first = stocked.doit("list", "two words")
    assert (first.returncode, first.stdout) == (0, "doit was given ['list', 'two words']\n")
    assert first.stderr.startswith("* making .venv with Python 3.")
    stocked.env |= {"PIP_FIND_LINKS": "/nowhere"}
    second = stocked.doit("list")
    assert (second.returncode, second.stdout, second.stderr) == (0, "doit was given ['list']\n", "")
    link = stocked.root.parent / "link"
    link.symlink_to(stocked.root / "doit")
    assert stocked.doit(script=str(link)).stdout == "doit was given []\n"
    (stocked.root / ".venv" / "bin" / "python").unlink()  # as when the machine's Python is upgraded
    stocked.env["VOLTFORGE_PYTHON"] = "/nowhere"
    third = stocked.doit("list")
    assert "no /nowhere" in third.stderr


@pytest.mark.slow
def test_requirements_with_another_hash_are_not_installed(stocked):
    requirements = stocked.root / "requirements.txt"
    good = requirements.read_text()
    requirements.write_text(re.sub(r"sha256:\w{8}", "sha256:00000000", good))
    bad = stocked.doit("list")
    assert bad.returncode != 0
    assert "hash" in bad.stderr.lower()
    assert bad.stdout == ""
    assert not (stocked.root / ".venv" / "requirements.txt").exists()
    requirements.write_text(good)
    assert stocked.doit("list").returncode == 0


@pytest.mark.slow
def test_two_simultaneous_first_calls_make_one_environment(stocked):
    calls = [
        subprocess.Popen(["./doit", "list"], cwd=stocked.root, env=stocked.env, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    said = [call.communicate(timeout=120) for call in calls]
    assert [call.returncode for call in calls] == [0, 0]
    assert [out for out, _ in said] == ["doit was given ['list']\n"] * 2
    told = "".join(err for _, err in said)
    assert (told.count("* making .venv"), told.count("* waiting for the .venv")) == (1, 1)


def test_the_script_is_plain_posix_shell(repository):
    script = (repository / "doit").read_text()
    assert script.startswith("#!/bin/sh\n")
    assert os.access(repository / "doit", os.X_OK)
    shell = shutil.which("dash") or "/bin/sh"
    assert subprocess.run([shell, "-n", repository / "doit"], check=False).returncode == 0


@pytest.mark.slow
def test_the_first_call_installs_the_locked_packages_with_uv_and_no_package_of_tests(bare, tmp_path):
    bare.env |= {"HOME": str(tmp_path / "home"), "VOLTFORGE_PYTHON": sys.executable}
    done = bare.doit("list")
    assert done.returncode == 0, done.stderr
    assert "wheels" in done.stdout
    assert re.match(r"\* making \.venv with Python .*\n", done.stderr)
    assert "pip installs the packages" not in done.stderr
    assert re.search(r"\* \.venv is ready after \d+ s\n\Z", done.stderr)
    [packages] = (bare.root / ".venv" / "lib").glob("python*/site-packages")
    assert (packages / "pydantic").is_dir()
    assert not (packages / "pytest").exists()


@pytest.mark.slow
def test_pip_installs_the_packages_if_uv_does_not_run(stocked, tmp_path):
    script = {"uv-0.1.data/scripts/uv": "#!/bin/sh\necho wrong libc >&2\nexit 1\n"}
    uv = samples.wheel(tmp_path / "uv", script, name="uv", version="0.1")
    uv = uv.rename(tmp_path / "shelf" / uv.name)
    with (stocked.root / "requirements.txt").open("a") as lock:
        lock.write(f"uv==0.1 --hash=sha256:{files.sha256(uv)}\n")
    done = stocked.doit("list")
    assert (done.returncode, done.stdout) == (0, "doit was given ['list']\n")
    assert "* uv does not run on this machine: pip installs the packages" in done.stderr


@pytest.mark.slow
def test_another_voltforge_python_makes_another_environment(stocked):
    assert stocked.doit("list").returncode == 0
    again = stocked.doit("list")
    assert again.stderr == ""
    link = stocked.root.parent / "python-of-another-name"
    link.symlink_to(sys.executable)
    stocked.env["VOLTFORGE_PYTHON"] = str(link)
    assert "* making .venv" in stocked.doit("list").stderr
    assert stocked.doit("list").stderr == ""
    stocked.env["VOLTFORGE_PYTHON"] = "/nowhere"
    refused = stocked.doit("list")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "no /nowhere" in refused.stderr


def test_the_bootstrap_imports_the_standard_library_alone(repository):
    script = "import voltforge.commands.bootstrap, sys; print(*sys.modules, sep='\\n')"
    words = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(repository)!r}); {script}"]
    loaded = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert {name.partition(".")[0] for name in loaded} - {"__main__", "voltforge"} <= sys.stdlib_module_names


def test_one_requirement_is_taken_from_a_lock_with_all_its_hashes(repository):
    lock = (repository / "requirements.txt").read_text()
    lines = bootstrap.requirement("uv", lock).splitlines()
    assert re.fullmatch(r"uv==\S+ \\", lines[0])
    assert len(lines) > 10
    assert all(line.startswith("    --hash=sha256:") for line in lines[1:] if "#" not in line)
    assert bootstrap.requirement("nothing", lock) == ""


@pytest.mark.slow
def test_a_python_without_pip_makes_the_environment_with_the_pip_of_ensurepip(stocked, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    stocked.env["VOLTFORGE_PYTHON"] = str(tmp_path / "bare" / "bin" / "python")
    done = stocked.doit("list")
    assert (done.returncode, done.stdout) == (0, "doit was given ['list']\n"), done.stderr


@pytest.mark.slow
def test_a_full_disk_is_reported_with_a_remedy(stocked, tmp_path):
    """A fake pip ends with the line that pip prints on a full disk: to fill a disk, a test would need to be root."""
    fake = tmp_path / "pip" / "pip"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text("raise SystemExit('ERROR: [Errno 28] No space left on device')")
    (tmp_path / "pip" / "pip-99.0.dist-info").mkdir()
    (tmp_path / "pip" / "pip-99.0.dist-info" / "METADATA").write_text("Name: pip\nVersion: 99.0\n")
    stocked.env["PYTHONPATH"] = str(tmp_path / "pip")
    done = stocked.doit("list")
    assert (done.returncode, done.stdout) == (1, "")
    assert "x the packages of requirements.txt could not be installed" in done.stderr
    assert re.search(r"try: .*make room.*; the next ./doit starts over\n\Z", done.stderr)
