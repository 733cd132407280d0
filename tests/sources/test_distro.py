"""The distribution's mirrors as a real apt is configured for them, and its way to install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from voltforge.sources import distro
from voltforge.sources.fetch import Artifact, Store

# apt is what is asked here: without it there is nothing to compare with. CI runs on Debian and skips none of these.
needs_apt = pytest.mark.skipif(not shutil.which("apt-get"), reason="this machine has no apt")

SOURCES = """\
Types: deb deb-src
URIs: http://one.example/debian/ mirror+file:{listing}
Suites: trixie trixie-updates
Components: main non-free

Types: deb
URIs: http://safe.example/debian-security
Suites: trixie-security
Components: main
"""

ONE_LINE_SOURCES = """\
deb [arch=amd64] http://two.example/debian trixie main
deb http://two.example/debian trixie-backports main
deb file:{folder} trixie main
deb http://old.example/debian-security stretch/updates main
deb http://flat.example/cuda/ ./
deb cdrom:[Debian 13]/ trixie main
"""


@pytest.fixture
def apt(tmp_path):
    """Gives an environment in which apt has a configuration of its own, and never saw a package list."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "lists").mkdir()
    (tmp_path / "mirrors.txt").write_text("# nearest first\nhttp://near.example/debian/\tpriority:1\n")
    (tmp_path / "parts" / "a.sources").write_text(SOURCES.format(listing=tmp_path / "mirrors.txt"))
    (tmp_path / "sources.list").write_text(ONE_LINE_SOURCES.format(folder=tmp_path / "debian"))

    def configure(*settings: str) -> dict[str, str]:
        places = {"Etc::sourcelist": "sources.list", "Etc::sourceparts": "parts", "State::lists": "lists"}
        lines = [*settings, *(f'Dir::{key} "{tmp_path / place}";' for key, place in places.items())]
        (tmp_path / "apt.conf").write_text("\n".join(lines))
        return {**os.environ, "APT_CONFIG": str(tmp_path / "apt.conf")}

    return configure


@needs_apt
def test_mirrors_of_both_forms_of_sources_are_given_once_and_without_security_flat_and_disc_archives(apt, tmp_path):
    assert sorted(distro.mirrors(apt())) == [
        f"file:{tmp_path / 'debian'}",
        "http://near.example/debian",
        "http://one.example/debian",
        "http://two.example/debian",
    ]


@needs_apt
def test_mirrors_keep_the_order_of_the_sources(apt, tmp_path):
    (tmp_path / "parts" / "a.sources").unlink()
    hosts = ["m", "b", "z", "a"]
    (tmp_path / "sources.list").write_text("".join(f"deb http://{host}.example/debian trixie main\n" for host in hosts))
    assert distro.mirrors(apt()) == tuple(f"http://{host}.example/debian" for host in hosts)


def test_a_machine_without_apt_has_no_mirrors_and_no_proxy(tmp_path):
    assert distro.mirrors({"PATH": str(tmp_path)}) == ()
    assert distro.proxies("http://one.example/debian", {"PATH": str(tmp_path)}) is None


@needs_apt
def test_apts_proxy_is_used_for_http_and_https_but_not_for_a_host_that_it_excepts(apt):
    environ = apt('Acquire::http::Proxy "http://proxy.example:3142";', 'Acquire::http::Proxy::one.example "DIRECT";')
    assert distro.proxies("http://two.example/debian", environ) == {"http": "http://proxy.example:3142"}
    assert distro.proxies("https://two.example/debian", environ) == {"https": "http://proxy.example:3142"}
    assert distro.proxies("http://one.example/debian", environ) == {"http": None}


@needs_apt
def test_without_a_proxy_of_its_own_apt_leaves_the_choice_to_the_environment(apt):
    assert distro.proxies("http://two.example/debian", apt("#clear Acquire::http::Proxy;")) is None


def test_name_is_from_os_release():
    assert distro.name() in Path("/etc/os-release").read_text()


@pytest.mark.parametrize(
    ("program", "start"),
    [("apt-get", "apt-get install"), ("dnf", "dnf install"), ("pacman", "pacman -S"), ("apk", "apk add")],
)
def test_install_command_uses_the_available_installer(tmp_path, program, start):
    # A stand-in: only one of these can be had on one machine, and none is run.
    (tmp_path / program).write_text("#!/bin/sh\n")
    (tmp_path / program).chmod(0o755)
    command = distro.install_command(["gcc", "it's"], {"PATH": str(tmp_path)})
    assert command.removeprefix("sudo ").startswith(start)
    assert command.startswith("sudo ") == (os.geteuid() != 0)
    assert command.endswith("""gcc 'it'"'"'s'""")


def test_hint_without_known_installer_names_the_packages(tmp_path):
    hint = distro.install_command(["gcc"], {"PATH": str(tmp_path)})
    assert hint == "install gcc with your distribution's package manager"


@pytest.mark.slow
@needs_apt
def test_a_package_comes_from_the_real_archive_by_its_path_in_the_pool(tmp_path):
    shown = subprocess.run(["apt-cache", "show", "--no-all-versions", "hostname"], capture_output=True, text=True)
    fields = dict(re.findall(r"^(Filename|SHA256|Size): (.+)$", shown.stdout, re.MULTILINE))
    if len(fields) < 3:
        # Lists are the machine's own, and a test does not fetch them; .ci/run does on a new machine.
        pytest.skip("apt has no package lists on this machine")
    file = Path(fields["Filename"]).name
    artifact = Artifact(file, fields["SHA256"], size=int(fields["Size"]), pool=fields["Filename"])
    store = Store(tmp_path, ask_archives=distro.mirrors)
    assert store.get(artifact).name == file
