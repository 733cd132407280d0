"""The settings of pip and uv give the indexes of this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.checkouts import ROOT
from voltforge.sources.index_settings import IndexSettings, configured
from voltforge.system.process import run

NO_PIP = Path("no-such-python")
"""An interpreter that does not exist, so that only the given environment counts."""


def without_pip(environ: dict[str, str]) -> IndexSettings:
    return configured({"PATH": "", **environ}, python=NO_PIP)


@pytest.mark.parametrize("stronger", range(3))
def test_the_variables_of_uv_precede_those_of_pip(stronger):
    order = ["UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"]
    environ = {name: f"https://{name.lower().replace('_', '-')}.example/simple" for name in order[stronger:]}
    assert without_pip(environ).default == environ[order[stronger]]


def test_extra_indexes_of_both_tools_are_merged():
    found = without_pip({
        "UV_INDEX": "https://a.example/simple",
        "UV_EXTRA_INDEX_URL": "https://b.example/simple",
        "PIP_EXTRA_INDEX_URL": "https://c.example/simple https://a.example/simple",
    })  # fmt: skip
    assert found.extra == ("https://a.example/simple", "https://b.example/simple", "https://c.example/simple")


def test_paths_of_find_links_and_indexes_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = without_pip({"PIP_FIND_LINKS": "~/wheels more", "UV_FIND_LINKS": "/a b,/c", "UV_INDEX": "simple"})
    assert found.find_links == ("/a b", "/c", str(tmp_path / "wheels"), str(tmp_path / "more"))
    assert found.extra == ((tmp_path / "simple").as_uri(),)


def test_an_index_with_a_name_gets_the_credentials_of_that_name():
    found = without_pip({
        "UV_DEFAULT_INDEX": "our-team.x=https://pypi.example/simple?a=b",
        "UV_INDEX_OUR_TEAM_X_USERNAME": "me",
        "UV_INDEX_OUR_TEAM_X_PASSWORD": "p@ss/word",
    })  # fmt: skip
    assert found.default == "https://me:p%40ss%2Fword@pypi.example/simple?a=b"


@pytest.mark.parametrize("variable", ["PIP_NO_INDEX", "UV_NO_INDEX"])
def test_no_index_can_be_configured(variable):
    found = without_pip({variable: "1", "PIP_FIND_LINKS": "/wheels", "UV_INDEX": "https://a.example/simple"})
    assert (found.find_links, found.indexes) == (("/wheels",), ())
    assert "--no-index" in found.uv_arguments()
    assert "--index" not in found.uv_arguments()


def test_the_first_certificate_setting_is_used_and_named():
    names = ["PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"]
    for number, name in enumerate(names):
        found = without_pip({each: f"/{each}.pem" for each in names[number:]})
        assert (found.certificate, found.certificate_from) == (f"/{name}.pem", name)


def test_configuration_files_of_pip_are_read_in_pips_order(tmp_path):
    (tmp_path / "pip.conf").write_text(
        "[global]\n"
        "index-url = https://me:it's@pypi.example/simple\n"
        "extra-index-url =\n    file:///srv/one/simple\n    https://two.example/simple\n"
        "find-links = /srv/wheels\n"
        "cert = /srv/ca.pem\n"
        "[install]\n"
        "find-links = /srv/install\n"
    )
    hidden = ("PIP_", "UV_", "SSL_", "REQUESTS_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    found = configured({**environ, "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}, _python_with_pip())
    assert found == IndexSettings(
        default="https://me:it's@pypi.example/simple",
        extra=("file:///srv/one/simple", "https://two.example/simple"),
        find_links=("/srv/install",),
        certificate="/srv/ca.pem",
        certificate_from="pip's setting `cert`",
    )


def test_an_environment_variable_overrides_pips_configuration_file(tmp_path):
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://file.example/simple\n")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    environ |= {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "PIP_INDEX_URL": "https://variable.example/simple"}
    assert configured(environ, _python_with_pip()).default == "https://variable.example/simple"


def _python_with_pip() -> Path:
    for python in (sys.executable, *(f"{folder}/python3" for folder in os.get_exec_path())):
        if Path(python).exists() and not os.system(f"'{python}' -m pip --version >/dev/null 2>&1"):
            return Path(python)
    # These tests compare with the real pip, so a fake one would prove nothing. The .venv of CI has pip.
    pytest.skip("no Python with pip on this machine")


def test_the_defaults_of_pip_and_uv_stay_without_configuration():
    found = without_pip({})
    assert found == IndexSettings()
    assert not {"--default-index", "--no-index"} & set(found.uv_arguments())


def test_settings_are_read_with_the_standard_library_alone():
    script = "import voltforge.sources.index_settings, sys; print(*sorted(sys.modules), sep='\\n')"
    loaded = run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {script}"]).output
    packages = {name.partition(".")[0] for name in loaded.split()} - {"__main__", "voltforge"}
    assert packages <= sys.stdlib_module_names
