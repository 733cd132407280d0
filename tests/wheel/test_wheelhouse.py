"""The wheelhouse as pip, uv and pypi-simple find it: from the disk, over HTTP, and beside another index."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from pypi_simple import IndexPage, ProjectPage, PyPISimple
from uv import find_uv_bin

from tests.support import samples
from tests.support.rights import ordinary_user
from voltforge.system import files
from voltforge.wheel import provenance, signing
from voltforge.wheel.signing import Signer, Trust
from voltforge.wheel.wheelfile import WheelError, metadata_bytes
from voltforge.wheel.wheelhouse import Wheelhouse, WheelhouseError

LOCAL = "1.0+sm70.cu124"
SAY = "import thing; print(thing.WHERE)"


def wheel(
    folder: Path, version: str = LOCAL, *, name: str = "thing", where: str = "ours", metadata: str = "", **more
) -> Path:
    """A wheel whose module says where it is from."""
    content = {f"{name}/__init__.py": f"WHERE = {where + ' ' + version!r}\n"}
    return samples.wheel(
        folder / name / version / where, content, name=name, version=version, metadata=metadata, **more
    )


def described(folder: Path, version: str = LOCAL, *, name: str = "thing") -> Path:
    """A wheel with an SBOM, as the pipeline makes them."""
    content = {f"{name}/__init__.py": "", f"{name}-{version}.dist-info/sboms/{name}.cdx.json": '{"bomFormat": "x"}'}
    return samples.wheel(folder / name / version, content, name=name, version=version)


def keep(one: Wheelhouse, path: Path, signer: Signer | None = None, python: str = "cp311") -> dict[str, Any]:
    """Take a wheel in with receipt and provenance, as the last stage does; gives the receipt's results."""
    results = {**one.entry(path), "build_key": "1" * 64, "materials": [{"name": "a.c", "kind": "source"}]}
    stage = f"wheels:{results['name']}"
    statement = provenance.statement({"stage": stage, "key": "2" * 64, "inputs": {}, "results": results})
    one.add(path, statement, signer)
    results["statement"] = files.sha256_bytes(statement)
    files.write_json(one.receipt(results["name"], python), {"stage": stage, "results": results})
    return results


def house(folder: Path, *wheels: Path) -> Wheelhouse:
    one = Wheelhouse(folder)
    for path in wheels:
        one.add(path)
    return one


@pytest.fixture
def ours(tmp_path) -> Wheelhouse:
    """A wheelhouse with one wheel, whose version has a local part."""
    return house(tmp_path / "wheel house", wheel(tmp_path / "made"))


@pytest.fixture
def plain(tmp_path) -> Wheelhouse:
    """Another local index, that has the same version without a local part."""
    return house(tmp_path / "plain", wheel(tmp_path / "made", "1.0", where="theirs"))


def simple(one: Wheelhouse) -> str:
    return (one.path / "simple").as_uri()


class Installer:
    """pip or uv, with no configuration but what a test gives, so that nothing but the disk and loopback is asked."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        own = ("PIP_", "UV_", "PYTHONPATH")
        self.env = {
            key: value for key, value in os.environ.items() if not key.startswith(own) and "proxy" not in key.lower()
        }
        self.env |= {"PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1", "UV_CACHE_DIR": str(folder / "cache")}

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
        return subprocess.run(
            [*(pip if self.name == "pip" else [find_uv_bin(), "pip"]), *words],
            env=self.env, cwd=self.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def install(self, *words: str) -> str:
        """Install into a folder, and give what the module there says."""
        target = Path(tempfile.mkdtemp(dir=self.folder))
        python = ["--python", sys.executable] if self.name == "uv" else []
        done = self("install", "--target", str(target), *python, *words)
        if done.returncode:
            raise AssertionError(done.stdout + done.stderr)
        said = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(target)!r}); {SAY}"],
                              capture_output=True, text=True, check=True)  # fmt: skip
        return said.stdout.strip()


@pytest.fixture(params=["pip", "uv"])
def installer(request, tmp_path) -> Installer:
    folder = tmp_path / "installer"
    folder.mkdir()
    return Installer(request.param, folder)


@pytest.fixture
def pip(tmp_path) -> Installer:
    return Installer("pip", tmp_path)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The folder as any web server would show it, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.server_address[1]}", asked
        finally:
            listener.shutdown()
            thread.join()


# --- installing ---


def test_wheel_is_installed_from_the_index_on_disk(ours, installer):
    assert installer.install("--index-url", simple(ours), "thing") == f"ours {LOCAL}"


def test_wheel_is_installed_from_the_folder_itself(ours, installer):
    assert installer.install("--no-index", "--find-links", str(ours.path), "thing") == f"ours {LOCAL}"


def test_wheel_is_installed_over_http_and_its_metadata_is_requested_first(ours, installer):
    with served(ours.path) as (url, asked):
        assert installer.install("--index-url", f"{url}/simple/", "thing") == f"ours {LOCAL}"
    files_asked = [path for path in asked if ".whl" in path]
    assert files_asked[0].endswith(".whl.metadata")
    assert files_asked[-1].endswith(".whl")


def test_local_version_satisfies_the_plain_version_and_is_preferred(ours, plain, installer):
    words = ["--index-url", simple(plain), "--extra-index-url", simple(ours)]
    if installer.name == "uv":
        words += ["--index-strategy", "unsafe-best-match"]  # otherwise uv looks no further than the first index
    assert installer.install(*words, "thing==1.0") == f"ours {LOCAL}"
    assert installer.install(*words, "thing") == f"ours {LOCAL}"


def test_uv_prefers_the_first_index(ours, plain, tmp_path):
    uv = Installer("uv", tmp_path)
    assert uv.install("--default-index", simple(plain), "--index", simple(ours), "thing==1.0") == f"ours {LOCAL}"


def test_requirements_of_a_wheel_come_from_the_other_index(tmp_path, installer):
    ours = house(tmp_path / "ours", wheel(tmp_path / "made", metadata="Requires-Dist: other<2\n"))
    theirs = house(tmp_path / "theirs", wheel(tmp_path / "made", "1.5", name="other"))
    assert (
        installer.install("--index-url", simple(theirs), "--extra-index-url", simple(ours), "thing") == f"ours {LOCAL}"
    )


def test_pip_downloads_a_wheel(ours, pip, tmp_path):
    done = pip("download", "--dest", str(tmp_path / "got"), "--index-url", simple(ours), "thing")
    assert done.returncode == 0, done.stderr
    [got] = (tmp_path / "got").iterdir()
    assert files.sha256(got) == files.sha256(ours.path / got.name)


def test_changed_wheel_is_refused(ours, installer):
    [path] = ours.path.glob("*.whl")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x03\x04") + 10] ^= 1  # a time in it: still a good zip, but other bytes
    path.write_bytes(data)
    for words in (["thing"], [f"thing=={LOCAL}"]):
        with pytest.raises(AssertionError, match=r"(?i)hash"):
            installer.install("--index-url", simple(ours), *words)


def test_wheel_for_another_python_is_not_installed(tmp_path, installer):
    one = house(tmp_path / "ours", wheel(tmp_path / "made", metadata="Requires-Python: >=3.99\n"))
    with pytest.raises(AssertionError, match=r"3\.99"):
        installer.install("--index-url", simple(one), "thing")


# --- the pages ---


def test_pypi_simple_reads_the_html_page(ours):
    with served(ours.path) as (url, _), PyPISimple(f"{url}/simple/") as client:
        [package] = client.get_project_page("thing").packages
        assert [*client.get_index_page().projects] == ["thing"]
        assert client.get_package_metadata(package) == (ours.path / f"{package.filename}.metadata").read_text()
    check_page(package, ours)


def test_pypi_simple_reads_the_json_page(ours):
    page = json.loads((ours.path / "simple" / "thing" / "index.json").read_text())
    assert page["meta"] == {"api-version": "1.1"}
    assert page["versions"] == [LOCAL]
    read = ProjectPage.from_json_data(page, base_url=f"{simple(ours)}/thing/")
    [package] = read.packages
    check_page(package, ours)
    assert package.size == (ours.path / package.filename).stat().st_size
    assert (read.project, read.versions, read.repository_version) == ("thing", [LOCAL], "1.1")
    index = IndexPage.from_json_data(json.loads((ours.path / "simple" / "index.json").read_text()))
    assert index.projects == ["thing"]


def check_page(package, ours: Wheelhouse) -> None:
    path = ours.path / package.filename
    assert package.filename == f"thing-{LOCAL}-py3-none-any.whl"
    assert (package.project, package.version) == ("thing", LOCAL)
    assert package.digests == {"sha256": files.sha256(path)}
    assert package.has_metadata
    assert package.metadata_digests == {"sha256": files.sha256(path.with_name(f"{path.name}.metadata"))}
    assert package.url.endswith(f"/thing-{LOCAL.replace('+', '%2B')}-py3-none-any.whl")


def test_required_python_is_escaped_in_html(tmp_path):
    one = house(tmp_path / "ours", wheel(tmp_path / "made", metadata="Requires-Python: >=3.10,<3.14\n"))
    html = (one.path / "simple" / "thing" / "index.html").read_text()
    assert 'data-requires-python="&lt;3.14,&gt;=3.10"' in html
    page = json.loads((one.path / "simple" / "thing" / "index.json").read_text())
    assert page["files"][0]["requires-python"] == "<3.14,>=3.10"


def test_equal_wheels_give_equal_pages(tmp_path):
    made = [wheel(tmp_path / "made", name=name) for name in ("b", "a", "c")]
    one, other = house(tmp_path / "one", *made), house(tmp_path / "other", *reversed(made))
    pages = [
        {str(path.relative_to(each.path)): path.read_bytes() for path in each.path.rglob("*") if path.is_file()}
        for each in (one, other)
    ]
    assert pages[0] == pages[1]
    assert len(pages[0]) == 3 * 2 + 2 * 4


def test_empty_index_is_valid(tmp_path, pip):
    one = Wheelhouse(tmp_path / "ours")
    one.index()
    with pytest.raises(AssertionError, match="No matching distribution"):
        pip.install("--index-url", simple(one), "thing")


# --- keeping ---


def test_entry_describes_the_wheel(tmp_path):
    path = described(tmp_path / "made")
    document = {"file": f"{path.name}.cdx.json", "sha256": files.sha256_bytes(b'{"bomFormat": "x"}')}
    assert Wheelhouse(tmp_path).entry(path) == {
        "file": path.name, "name": "thing", "version": LOCAL,
        "sha256": files.sha256(path), "size": path.stat().st_size, "sbom": document,
        "metadata": files.sha256_bytes(metadata_bytes(path)), "requires_python": "",
    }  # fmt: skip
    assert Wheelhouse(tmp_path).entry(wheel(tmp_path / "made"))["sbom"] is None


@pytest.mark.parametrize("lost", ["metadata", "requires_python", "sbom", "statement"])
def test_incomplete_receipt_holds_no_wheel(tmp_path, lost):
    one = Wheelhouse(tmp_path / "ours")
    results = keep(one, described(tmp_path / "made"))
    assert one.holds(results)
    del results[lost]
    assert not one.holds(results)


def test_added_wheel_is_held_with_its_files_beside_it(tmp_path):
    one = Wheelhouse(tmp_path / "ours")
    path = described(tmp_path / "made")
    assert one.holds(keep(one, path))
    assert [str(made.version) for made in one.wheels()] == [LOCAL]
    assert (one.path / f"{path.name}.cdx.json").read_bytes() == b'{"bomFormat": "x"}'
    said = provenance.read(signing.unverified_payload((one.path / f"{path.name}.intoto.jsonl").read_bytes()))
    assert (said.file, said.sha256) == (path.name, files.sha256(path))


@pytest.mark.parametrize("older", ["0.9", "1.0+sm70.cu123", "1.1"])
def test_wheel_replaces_other_wheels_of_its_project_only(tmp_path, older):
    one = house(tmp_path / "ours", wheel(tmp_path / "made", older), wheel(tmp_path / "made", "3.0", name="other"))
    one.add(wheel(tmp_path / "made"))
    assert {(made.name, made.version) for made in one.wheels()} == {
        ("other", Version("3.0")),
        ("thing", Version(LOCAL)),
    }
    assert sorted(path.name for path in one.path.iterdir() if older in path.name) == []
    assert f"thing-{older}-" not in (one.path / "simple" / "thing" / "index.html").read_text().replace("%2B", "+")


def test_rebuilt_version_replaces_the_old_wheel(tmp_path, pip):
    one = house(tmp_path / "ours", wheel(tmp_path / "made", where="first"), wheel(tmp_path / "made", where="second"))
    assert pip.install("--index-url", simple(one), "thing") == f"second {LOCAL}"


def test_project_name_is_found_in_every_spelling(tmp_path):
    """By uv: pip before 23.1 compares the name in a PEP 658 file letter by letter, and lets such a wheel lie."""
    one = house(
        tmp_path / "ours", samples.wheel(tmp_path / "made", {"thing.py": "WHERE = 1"}, name="Thing_Two", version="1")
    )
    assert [path.name for path in (one.path / "simple").iterdir() if path.is_dir()] == ["thing-two"]
    for name in ("thing-two", "Thing.Two"):
        assert Installer("uv", tmp_path).install("--index-url", simple(one), name) == "1"


PARTS = ["", ".metadata", ".cdx.json", ".intoto.jsonl", "simple/thing/index.html", "simple/thing/index.json"]


def part(one: Wheelhouse, kept: dict[str, Any], name: str) -> Path:
    return one.path / name if "/" in name else one.path / f"{kept['file']}{name}"


@pytest.mark.parametrize("spoil", ["gone", "cut", "emptied", "another byte"])
@pytest.mark.parametrize("name", PARTS)
def test_wheel_is_not_held_if_any_file_is_missing_or_changed(tmp_path, name, spoil):
    one = Wheelhouse(tmp_path / "ours")
    kept = keep(one, described(tmp_path / "made"))
    path = part(one, kept, name)
    data = path.read_bytes()
    if spoil == "gone":
        path.unlink()
    else:
        at = data.find(kept["sha256"].encode()) if "/" in name else len(data) // 2
        other = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        path.write_bytes({"cut": data[: len(data) // 2], "emptied": b"", "another byte": other}[spoil])
    assert not one.holds(kept)
    assert one.wheel_problems(one.wheels()[0], Trust())[0] if name else True
    path.write_bytes(data)
    assert one.holds(kept)
    assert one.wheel_problems(one.wheels()[0], Trust()) == ([], "nobody: no key is trusted here")


def test_only_trusted_signatures_pass_if_there_are_trusted_keys(tmp_path):
    mine, other = (signing.make_key(tmp_path / name) for name in ("mine.pem", "other.pem"))
    one = Wheelhouse(tmp_path / "ours")
    keep(one, described(tmp_path / "made"))
    made = one.wheels()[0]
    assert "the statement is not signed" in one.wheel_problems(made, Trust.of(mine))[0][0]
    assert one.sign(other) == [made.path.name]
    assert "unknown key" in one.wheel_problems(made, Trust.of(mine))[0][0]
    assert one.sign(mine) == [made.path.name]
    assert one.wheel_problems(made, Trust.of(mine)) == ([], "a trusted key")


def test_signed_wheel_is_still_held(tmp_path):
    one = Wheelhouse(tmp_path / "ours")
    kept = keep(one, described(tmp_path / "made"), signing.make_key(tmp_path / "first.pem"))
    assert one.holds(kept)
    one.sign(signing.make_key(tmp_path / "second.pem"))
    assert one.holds(kept)


def test_provenance_of_another_wheel_is_reported(tmp_path):
    """Nor does its receipt, nor a wheel that nobody made here."""
    signer = signing.make_key(tmp_path / "key.pem")
    one, elsewhere = Wheelhouse(tmp_path / "ours"), Wheelhouse(tmp_path / "elsewhere")
    kept = keep(one, described(tmp_path / "made"), signer)
    keep(elsewhere, described(tmp_path / "made", "1.0"), signer)
    replayed = next(elsewhere.path.glob("*.intoto.jsonl")).read_bytes()
    made, envelope = one.wheels()[0], one.path / f"{kept['file']}.intoto.jsonl"
    mine = envelope.read_bytes()
    envelope.write_bytes(replayed)
    told = one.wheel_problems(made, Trust.of(signer))[0]
    assert [line.split(" with")[0] for line in told] == [
        "its provenance is about thing-1.0-py3-none-any.whl",
        f"the receipt of {kept['file']} does not match its provenance",
    ]
    envelope.write_bytes(mine)
    one.receipt("thing", "cp311").unlink()
    assert one.wheel_problems(made, Trust.of(signer))[0] == [f"{kept['file']} has no receipt"]


EVIL = "http://evil.example/thing-9.0-py3-none-any.whl"


def offers_a_foreign_file(page: Path) -> None:
    """Add one, newer than any of ours, to what a page offers."""
    if page.suffix == ".html":
        page.write_text(page.read_text().replace("  </body>", f'    <a href="{EVIL}">{EVIL[20:]}</a><br>\n  </body>'))
    else:
        said = json.loads(page.read_text())
        said["files"].append({"filename": EVIL[20:], "url": EVIL, "hashes": {}})
        page.write_text(json.dumps(said))


@pytest.mark.parametrize("name", ["index.html", "index.json"])
def test_index_page_with_a_foreign_file_is_reported(tmp_path, name):
    """pip would take the newer one; our own entry is there all the same, so the wheel itself stays held."""
    one = Wheelhouse(tmp_path / "ours")
    kept = keep(one, described(tmp_path / "made"))
    assert one.index_problems() == []
    page = one.path / "simple" / "thing" / name
    offers_a_foreign_file(page)
    assert ProjectPage.from_json_data(json.loads(page.read_text())).packages[-1].url == EVIL if "json" in name else True
    assert one.index_problems() == [f"the index (simple/thing/{name}) does not match the wheels"]
    assert one.holds(kept)
    one.index()
    assert one.index_problems() == []


@pytest.mark.parametrize("as_link", [False, True])
def test_page_of_a_project_without_a_wheel_is_reported(tmp_path, as_link):
    one = Wheelhouse(tmp_path / "ours")
    keep(one, described(tmp_path / "made"))
    page = tmp_path / "elsewhere" if as_link else one.path / "simple" / "evil"
    files.write(page / "index.html", f'<a href="{EVIL}">{EVIL[20:]}</a>')
    if as_link:
        (one.path / "simple" / "evil").symlink_to(page)
    assert one.index_problems() == [
        f"the index has simple/evil{'' if as_link else '/index.html'}, which belongs to no wheel of the wheelhouse"
    ]


@pytest.mark.parametrize("name", ["index.html", "index.json", "thing/index.html"])
def test_missing_or_changed_page_is_reported(tmp_path, name):
    one = Wheelhouse(tmp_path / "ours")
    keep(one, described(tmp_path / "made"))
    page = one.path / "simple" / name
    before = page.read_bytes()
    for content in (None, before + b" ", b""):
        files.remove(page) if content is None else page.write_bytes(content)
        assert one.index_problems() == [f"the index (simple/{name}) does not match the wheels"]
    page.write_bytes(before)
    assert one.index_problems() == []


def test_two_wheels_of_a_project_share_a_page(tmp_path):
    made = [wheel(tmp_path / python, tag=f"{python}-{python}-linux_x86_64") for python in ("cp38", "cp39")]
    one = house(tmp_path / "ours", *made)
    assert len(one.wheels()) == 2
    assert one.index_problems() == []


def test_receipt_of_a_missing_wheel_is_reported(tmp_path):
    one = Wheelhouse(tmp_path / "ours")
    kept = keep(one, described(tmp_path / "made"))
    files.write(one.receipt("broken", "cp9"), "{")
    for path in one.path.glob(f"{kept['file']}*"):
        path.unlink()
    one.index()
    assert one.index_problems() == [
        "receipts/broken-cp9.json names no wheel",
        f"receipts/thing-cp311.json names {kept['file']}, which does not exist",
    ]


def test_receipts_are_named_by_project_and_python(tmp_path):
    assert Wheelhouse(tmp_path).receipt("thing", "cp311") == tmp_path / "receipts" / "thing-cp311.json"


def test_wheel_for_another_python_stays(tmp_path):
    mine = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    made = [
        wheel(tmp_path / str(number), version, tag=f"{tag}-{tag}-linux_x86_64")
        for number, (version, tag) in enumerate([("1.0", mine), ("1.0", "cp39"), ("2.0", "cp39"), ("2.0", mine)])
    ]
    one = house(tmp_path / "ours", *made)
    assert {path.name for path in one.path.glob("*.whl")} == {made[2].name, made[3].name}
    page = (one.path / "simple/thing/index.html").read_text()
    assert all((name in page) == (one.path / name).exists() for name in (path.name for path in made))


def test_receipts_of_removed_wheels_are_removed(tmp_path):
    one = Wheelhouse(tmp_path / "ours")
    for version, name in (("1.0", "thing"), ("1.0", "other"), ("2.0", "thing")):
        keep(one, described(tmp_path / "made", version, name=name), python=f"cp{version[0]}")
    files.write(one.receipt("broken", "cp9"), "{")
    one.add(described(tmp_path / "made", "3.0", name="third"))
    assert {path.name for path in (one.path / "receipts").iterdir()} == {"other-cp1.json", "thing-cp2.json"}


def test_malformed_wheel_is_not_added(tmp_path):
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    path.write_bytes(b"PK\x05\x06")
    with pytest.raises(WheelError):
        Wheelhouse(tmp_path / "ours").add(path)
    assert not (tmp_path / "ours").exists()


def test_unwritable_folder_is_reported_in_a_sentence():
    with ordinary_user(), tempfile.TemporaryDirectory() as room:
        path = wheel(Path(room, "made"))
        locked = Path(room, "ours")
        locked.mkdir()
        locked.chmod(0o555)
        with pytest.raises(WheelhouseError) as caught:
            Wheelhouse(locked).add(path)
        assert [*locked.iterdir()] == []
    assert caught.value.what == f"{locked} could not be written: Permission denied"
    assert caught.value.hint


def test_failed_index_update_leaves_the_old_index(ours, tmp_path, monkeypatch):
    before = (ours.path / "simple" / "thing" / "index.html").read_bytes()
    write = files.write

    def full(path: Path, data: bytes | str) -> None:
        if path.name == "index.json":
            raise OSError(28, os.strerror(28), str(path))
        write(path, data)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(WheelhouseError, match="No space left on device"):
        ours.add(wheel(tmp_path / "made", "2.0"))
    assert (ours.path / "simple" / "thing" / "index.html").read_bytes() == before
    assert (ours.path / f"thing-{LOCAL}-py3-none-any.whl").exists()
