"""Recipes are checked when they are read: every rule, all problems at once, the file and the key named."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from voltforge.errors import VoltforgeError
from voltforge.sources import recipe
from voltforge.sources.recipe import CudaRecipe, Recipe, RecipeError, load, load_all, load_cuda

GOOD = """\
name = "thing"
version = "1.2.3"
summary = "a thing"
arch = ["7.0", "8.6"]

[source]
index = "thing"
file = "thing-1.2.3.tar.gz"
sha256 = "{sha}"
size = 1234

[build]
lock = "locks/build.txt"
memory_per_job = "1.5 GiB"
env = {{ ARCH = "{{arch}}", VERSION = "{{version}}+sm70.{{cuda}}", JSON = "{{{{}}}}", LIB = "{{site}}/lib" }}

[finish.runpath]
"thing/*.so" = ["$ORIGIN/../torch/lib", "$ORIGIN"]

[expect]
lock = "locks/run.txt"
ops = "locks/ops.txt"
extensions = ["thing/_C.abi3.so"]
absent = ["*marlin*"]
requires = ["torch==2.9.0", "triton>=3; python_version < '3.14'"]
requires_not = ["flashinfer-python"]
imports = ["thing", "thing._C"]
max_size = "20 MB"
""".format(sha="ab" * 32)


@pytest.fixture
def folder(tmp_path):
    """A folder of recipes with the files that they name."""
    (tmp_path / "locks").mkdir()
    for name in ("build", "run", "ops"):
        (tmp_path / "locks" / f"{name}.txt").touch()
    return tmp_path


def written(folder: Path, text: str, name: str = "thing") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def edited(*changes: tuple[str, str]) -> str:
    """The good recipe with each first text replaced by the second."""
    text = GOOD
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def problems(path: Path) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert caught.value.path == path
    assert str(path) in caught.value.what
    assert all(problem in caught.value.what for problem in caught.value.problems)
    return caught.value.problems


# --- what is read ---


def test_a_recipe_is_read(folder):
    one = load(written(folder, GOOD))
    assert (one.name, one.version, one.arch) == ("thing", "1.2.3", ("7.0", "8.6"))
    assert one.source.artifact.file == "thing-1.2.3.tar.gz"
    assert (one.source.artifact.size, one.source.artifact.index) == (1234, "thing")
    assert (one.build.memory_per_job, one.expect.max_size) == (3 * 2**29, 20_000_000)
    assert one.finish.runpath == {"thing/*.so": ("$ORIGIN/../torch/lib", "$ORIGIN")}
    assert one.beside(one.build.lock) == folder / "locks" / "build.txt"


def test_placeholders_are_filled_in(folder):
    one = load(written(folder, GOOD))
    filled = one.build.variables(cuda="cu124", environment="/env", site="/site", cudaflags="", **one.variables)
    assert filled == {"ARCH": "7.0;8.6", "VERSION": "1.2.3+sm70.cu124", "JSON": "{}", "LIB": "/site/lib"}


def test_a_recipe_cannot_be_changed(folder):
    one = load(written(folder, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        one.version = "2"


def test_omitted_keys_have_defaults(folder):
    lines = GOOD.splitlines(keepends=True)
    needed = ("name", "version", "[", "index", "file", "sha256", "lock")
    one = load(written(folder, "".join(line for line in lines if line.startswith(needed) and "finish" not in line)))
    assert (one.arch, one.build.env, one.finish.runpath, one.expect.ops) == ((), {}, {}, None)
    assert (one.source.size, one.build.memory_per_job, one.expect.max_size) == (None, 3 * 2**29, None)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1 B", 1), ("20 MB", 20_000_000), ("1.5 GiB", 1_610_612_736), ("500MiB", 524_288_000), ("0.1 kB", 100)],
)
def test_sizes_have_a_unit(folder, text, size):
    assert load(written(folder, edited(('"20 MB"', f'"{text}"')))).expect.max_size == size


# --- what is refused ---


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('name = "thing"\n', "", "name: is missing"),
        ('version = "1.2.3"\n', "", "version: is missing"),
        ('name = "thing"', 'name = "Thing"', "name: not a normalized project name"),
        ('name = "thing"', "name = 7", "name: Input should be a valid string"),
        ('"1.2.3"', '"one"', "version: not a version (PEP 440) (it is 'one')"),
        ('"1.2.3"', "1.2", "version: Input should be a valid string (it is 1.2)"),
        ('"8.6"', '"sm_86"', "arch.1: "),
        ('"8.6"', '"0.7"', "arch.1: "),
        ('"8.6"', '"8.6+PTX"', "arch.1: "),
        ('summary = "a thing"', 'sumary = "a thing"', "sumary: is not a key of a recipe"),
        ("size = 1234", "size = -1", "source.size: "),
        ("size = 1234", 'size = "1234"', "source.size: "),
        ("size = 1234", "size = true", "source.size: "),
        ("size = 1234", "size = 1234\nmirror = 1", "source.mirror: is not a key of a recipe"),
        ('index = "thing"\n', "", "source: needs exactly one of index, url and pool"),
        ("size = 1234", 'url = "https://example.org/a.tar.gz"', "source: needs exactly one of index, url and pool"),
        ('index = "thing"', 'url = "ftp://example.org/a"', "source.url: "),
        ('index = "thing"', 'url = "https://"', "source.url: "),
        ('index = "thing"', 'pool = "main/a.deb"', "source.pool: "),
        ('index = "thing"', 'pool = "pool/../../a.deb"', "source.pool: not a path that stays inside its folder"),
        ('index = "thing"', 'index = "https://example.org/simple"', "source.index: not a normalized project name"),
        ('"thing-1.2.3.tar.gz"', '"a/b.tar.gz"', "source.file: "),
        ('"thing-1.2.3.tar.gz"', '".."', "source.file: "),
        ('"thing-1.2.3.tar.gz"', r'"a\u0000b"', "source.file: "),
        ("ab" * 32, "AB" * 32, "source.sha256: "),
        ("ab" * 32, "ab" * 31, "source.sha256: "),
        ('"locks/build.txt"', '"/etc/passwd"', "build.lock: not a path that stays inside its folder"),
        ('"locks/build.txt"', '"../build.txt"', "build.lock: not a path that stays inside its folder"),
        ('"locks/build.txt"', '""', "build.lock: not a path that stays inside its folder"),
        ('"locks/build.txt"', '"locks"', "build.lock: there is no "),
        ('"locks/build.txt"', '"locks/none.txt"', "build.lock: there is no "),
        ('"locks/run.txt"', '"locks/none.txt"', "expect.lock: there is no "),
        ('"locks/ops.txt"', '"locks/none.txt"', "expect.ops: there is no "),
        ('"1.5 GiB"', '"0 GiB"', "build.memory_per_job: not a size such as '20 MB' or '1.5 GiB' (it is '0 GiB')"),
        ('"1.5 GiB"', '"lots"', "build.memory_per_job: not a size"),
        ('"1.5 GiB"', "1500000000", "build.memory_per_job: not a size"),
        ('"1.5 GiB"', '"-1 GiB"', "build.memory_per_job: not a size"),
        ('"20 MB"', f'"{"9" * 400} MB"', "expect.max_size: not a size"),
        ('"20 MB"', '"20 mb"', "expect.max_size: not a size"),
        (
            '"{arch}"',
            '"{archs}"',
            "build.env.ARCH: has a placeholder that is none of {version}, {arch}, {cuda}, {environment}, {site}, {cuda",
        ),
        ('"{arch}"', '"{}"', "build.env.ARCH: has a placeholder that is none of"),
        ('"{arch}"', '"{arch[0]}"', "build.env.ARCH: has a placeholder that is none of"),
        ('"{arch}"', '"{arch.__class__}"', "build.env.ARCH: has a placeholder that is none of"),
        ('"{arch}"', '"{arch!r}"', "build.env.ARCH: has a placeholder that is none of"),
        ('"{arch}"', '"{arch:>9}"', "build.env.ARCH: has a placeholder that is none of"),
        ('"{arch}"', '"{"', "build.env.ARCH: has a single brace"),
        ('"{arch}"', '"}"', "build.env.ARCH: has a single brace"),
        ('"{arch}"', "7.0", "build.env.ARCH: Input should be a valid string"),
        ('"{arch}"', r'"a\u0000"', "build.env.ARCH: "),
        ("ARCH =", '"A=B" =', "build.env.A=B"),
        ("ARCH =", '"" =', "build.env."),
        ("[finish.runpath]", '[build.config_settings]\n"a=b" = "c"\n[finish.runpath]', "build.config_settings.a=b"),
        ("[finish.runpath]", '[build.config_settings]\na = "\\u0000"\n[finish.runpath]', "build.config_settings.a: "),
        ("[finish.runpath]", "[build.config_settings]\na = true\n[finish.runpath]", "build.config_settings.a: "),
        ('"$ORIGIN"]', '"/usr/lib"]', "finish.runpath.thing/*.so.1: "),
        ('"$ORIGIN"]', '"$ORIGINAL"]', "finish.runpath.thing/*.so.1: "),
        ('"torch==2.9.0"', '"torch = 2.9.0"', "expect.requires.0: not a requirement (PEP 508)"),
        ('"flashinfer-python"', '"Flashinfer_Python"', "expect.requires_not.0: not a normalized project name"),
        ('"thing._C"', '"thing/_C"', "expect.imports.1: "),
        ('["*marlin*"]', '"*marlin*"', "expect.absent: "),
        ('["*marlin*"]', '[""]', "expect.absent.0: "),
        ("[finish.runpath]", "[finished]\n[finish.runpath]", "finished: is not a key of a recipe"),
        ("[finish.runpath]", "[thin]\n[finish.runpath]", "thin: is not a key of a recipe"),
        ('summary = "a thing"', 'conditions = ["cudnn=0"]', "conditions: is not a key of a recipe"),
        (
            'summary = "a thing"',
            'variant = "thin"',
            "name and variant: is 'thing-thin', but the file is called thing.toml",
        ),
        ('summary = "a thing"', 'variant = "no-cuda"', "variant: "),
        ("size = 1234", 'commit = "v1.2.3"', "source.commit: "),
        ("[finish.runpath]", "[when]\ncudnn = 1\n[finish.runpath]", "when.cudnn: is not a table under a choice"),
        ("[finish.runpath]", '[when."cudn=0"]\n[finish.runpath]', "when.cudn=0: is not a table under a choice (torch="),
        ("[finish.runpath]", '[when."cudnn=0"]\nx = 1\n[finish.runpath]', "when.cudnn=0.x: is not a key of a recipe"),
        (
            "[finish.runpath]",
            '[when."cudnn=0".build]\nlock = "a"\n[finish.runpath]',
            "when.cudnn=0.build.lock: there is",
        ),
    ],
)
def test_each_broken_rule_is_reported_with_its_key(folder, old, new, problem):
    [found] = problems(written(folder, edited((old, new))))
    assert found.startswith(problem)
    assert len(found) < 400


def test_all_problems_are_reported_at_once(folder):
    changes = [('version = "1.2.3"\n', ""), ('"8.6"', '"x"'), ("ab" * 32, "short"), ('"{arch}"', '"{x}"')]
    found = problems(written(folder, edited(*changes, ('"{version}+sm70.{cuda}"', '"{y}"'), ('"20 MB"', '"x"'))))
    keys = ["version", "arch.1", "expect.max_size", "source.sha256", "build.env.ARCH", "build.env.VERSION"]
    assert [line.split(":")[0] for line in found] == keys


def test_missing_files_and_a_wrong_name_are_reported_together(folder):
    shutil.rmtree(folder / "locks")
    found = problems(written(folder, GOOD, "other"))
    assert found[0] == "name: is 'thing', but the file is called other.toml"
    assert found[1:] == [
        f"build.lock: there is no {folder / 'locks/build.txt'}",
        f"expect.lock: there is no {folder / 'locks/run.txt'}",
        f"expect.ops: there is no {folder / 'locks/ops.txt'}",
    ]


def test_a_missing_table_is_reported(folder):
    text = GOOD[: GOOD.index("[expect]")]
    assert problems(written(folder, text)) == ["expect: is missing"]


def test_the_path_of_the_file_is_not_a_key(folder):
    assert problems(written(folder, f'path = "/etc"\n{GOOD}')) == ["path: is not a key of a recipe"]


@pytest.mark.parametrize(
    "content",
    [b"name = ", b"\xff\xfe", b"[a]\n[a]", b"a = " + b"[" * 3000, b"a = " + b"9" * 5000, b"a = 2000-13-45", b"\0"],
)
def test_invalid_toml_is_reported(folder, content):
    path = folder / "thing.toml"
    path.write_bytes(content)
    [problem] = problems(path)
    assert problem.startswith("is not TOML: ")


def test_a_missing_recipe_file_is_reported(folder):
    assert problems(folder / "none.toml") == ["cannot be read: No such file or directory"]
    assert problems(folder / "locks") == ["cannot be read: Is a directory"]


# --- recipes of wheels ---

THIN = """\
name = "thing"
variant = "thin"
version = "1.2.3"
arch = ["7.0"]

[[wheels]]
index = "thing"
file = "thing-1.2.3-cp311-cp311-linux_x86_64.whl"
sha256 = "{sha}"

[thin]
drop = ["thing/bin/*"]
version = "thing/version.py"

[thin.stubs."libodd.so.3"]
folder = "thing/lib"
why = "which is left out"
answers = {{ oddInit = 10 }}
since = "8.0"

[expect]
lock = "locks/run.txt"
""".format(sha="cd" * 32)


def test_a_recipe_with_wheels_lists_changes_and_has_no_build(folder):
    one = load(written(folder, THIN, "thing-thin"))
    assert (one.name, one.variant, one.wheels[0].artifact.index) == ("thing", "thin", "thing")
    assert one.thin.stubs["libodd.so.3"].answers == {"oddInit": 10}


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('arch = ["7.0"]', "", "arch: is missing"),
        ("[thin]\n", "[build]\n[thin]\n", "build: is not a key of a recipe"),
        ('since = "8.0"', 'since = "8"', "thin.stubs.libodd.so.3.since: "),
        ("oddInit = 10", '"odd init" = 10', "thin.stubs.libodd.so.3.answers.odd init"),
        ('"thing/version.py"', '"/etc/passwd"', "thin.version: not a path that stays inside its folder"),
        ('why = "which is left out"\n', "", "thin.stubs.libodd.so.3.why: is missing"),
    ],
)
def test_the_rules_for_wheels_are_checked(folder, old, new, problem):
    [found] = problems(written(folder, THIN.replace(old, new), "thing-thin"))
    assert found.startswith(problem)


# --- choices ---


WHEN = """
[when."cudnn=0"]
expect.max_size = "10 MB"
build.env.ARCH = "none"
"""


def test_a_choice_overrides_keys_of_the_recipe(folder):
    path = written(folder, GOOD + WHEN)
    plain, without = load(path), load(path, {"cudnn": "0"})
    assert (plain.expect.max_size, without.expect.max_size) == (20_000_000, 10_000_000)
    assert without.build.env == {**plain.build.env, "ARCH": "none"}
    assert without.expect.extensions == plain.expect.extensions
    assert load(path, {"cudnn": "1"}) == plain


def torch_folder(folder: Path) -> Path:
    written(folder, edited(('name = "thing"', 'name = "torch"')) + WHEN, "torch")
    written(folder, THIN.replace('name = "thing"', 'name = "torch"'), "torch-thin")
    written(folder, GOOD)
    return folder


def test_a_choice_selects_the_variant_of_a_package(folder):
    torch_folder(folder)
    assert {name: one.variant for name, one in load_all(folder).items()} == {"thing": "source", "torch": "thin"}
    assert load_all(folder, {"torch": "source", "cudnn": "1"})["torch"].variant == "source"
    assert load_all(folder, {"torch": "source", "cudnn": "0"})["torch"].expect.max_size == 10_000_000


@pytest.mark.parametrize("choices", [{"torch": "thick"}, {"torch": "thin", "cudnn": "0"}, {"cudnn": "2"}])
def test_a_choice_without_effect_is_refused_with_the_valid_ones(folder, choices):
    with pytest.raises(VoltforgeError, match="changes no recipe") as caught:
        load_all(torch_folder(folder), choices)
    assert caught.value.hint == "torch=thin, torch=source, cudnn=0 with torch=source"


# --- folders of recipes ---


def test_all_recipes_of_a_folder_are_loaded_by_name_except_the_toolkits(folder):
    for name in ("thing", "another"):
        written(folder, GOOD.replace('name = "thing"', f'name = "{name}"'), name)
    written(folder, "", "cuda")
    assert list(load_all(folder)) == ["another", "thing"]


def test_an_invalid_recipe_stops_loading_the_folder(folder):
    written(folder, GOOD)
    written(folder, "oh", "broken")
    with pytest.raises(RecipeError, match=r"broken\.toml"):
        load_all(folder)


def test_the_recipes_of_this_repository_are_valid(repository):
    assert "vllm" in load_all(repository / "recipes")
    toolkits = load_cuda(repository / "recipes" / "cuda.toml")
    assert toolkits.redist.archives[0].artifact.url
    assert toolkits.distro.archives[0].artifact.pool


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('below = "13.0"', 'below = "11.0"', "below: is 11.0, which is not above at_least, 12.0"),
        ('version = "12.8.93"', 'version = "13.1"', "redist.version: is 13.1, which is not from 12.0 up to 13.0"),
        ('"locks/cuda-12.4.txt"', '"locks/none.txt"', "distro.lock: there is no "),
        ('name = "cuda"', 'name = "rocm"', "name: "),
        ("[distro]", "[distro]\nurl = 1", "distro.url: is not a key of a recipe"),
    ],
)
def test_the_rules_for_toolkits_are_checked(tmp_path, repository, old, new, problem):
    shutil.copytree(repository / "recipes", tmp_path / "recipes")
    path = tmp_path / "recipes" / "cuda.toml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_cuda(path)
    assert any(found.startswith(problem) for found in caught.value.problems)


# --- anything at all ---


def outcome(raw: bytes) -> Recipe | CudaRecipe | RecipeError:
    with tempfile.TemporaryDirectory() as room:
        (Path(room) / "locks").mkdir()
        path = Path(room) / "thing.toml"
        path.write_bytes(raw)
        answers = []
        for read in (load, load_cuda):
            try:
                answers.append(read(path))
            except RecipeError as error:
                answers.append(error)
        return answers[0]


@given(st.binary(max_size=200))
def test_any_bytes_give_a_recipe_or_a_recipe_error(raw):
    assert isinstance(outcome(raw), (Recipe, RecipeError))


KEYS = sorted(set(re.findall(r"\b([a-z_]+) =", GOOD)))
SCALARS = st.one_of(
    st.sampled_from(re.findall(r'"[^"\n]*"|\b\d+\b', GOOD)),
    st.integers().map(str),
    st.floats().map(lambda number: repr(number).replace("e+", "e")),
    st.booleans().map(lambda value: str(value).lower()),
    st.just("1979-05-27T07:32:00Z"),
    st.text(st.characters(exclude_categories=("C",)), max_size=8).map(
        lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    ),
)
ANY_VALUE = SCALARS | st.lists(SCALARS, max_size=3).map(lambda items: f"[{', '.join(items)}]") | st.just("{ a = 1 }")


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_any_value_of_any_key_gives_a_recipe_or_a_recipe_error(data):
    lines = GOOD.splitlines()
    for _ in range(data.draw(st.integers(1, 4))):
        number = data.draw(st.integers(0, len(lines) - 1))
        key = lines[number].split(" = ")[0] if " = " in lines[number] else data.draw(st.sampled_from(KEYS))
        lines[number] = f"{key} = {data.draw(ANY_VALUE)}"
    assert isinstance(outcome("\n".join(lines).encode()), (Recipe, RecipeError))


@given(st.text())
def test_any_text_of_a_variable_is_filled_in_or_refused(text):
    try:
        build = recipe.BuildSettings(lock="a", env={"A": text})
    except ValueError:
        return
    assert isinstance(build.variables(**dict.fromkeys(recipe.PLACEHOLDERS, "1"))["A"], str)


# --- the reference ---


def keys(model: type[BaseModel]) -> dict[str, Any]:
    return {name: field for name, field in model.model_fields.items() if not field.exclude}


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("## A package", recipe.SourceRecipe),
        ("### `[source]`", recipe.Source),
        ("### `[build]`", recipe.BuildSettings),
        ("### `[finish]`", recipe.Finish),
        ("### `[expect]`", recipe.Expect),
        ("## A stock wheel", recipe.ThinRecipe),
        ("### `[thin]`", recipe.Thin),
        ("### `[thin.stubs", recipe.Stub),
        ("## The toolkits", CudaRecipe),
        ("### `[redist]`", recipe.Provision),
    ],
)
def test_the_reference_lists_every_key_and_no_other(repository, heading, model):
    text = (repository / "docs" / "recipes.md").read_text()
    section = re.split(r"\n(?=##)", text[text.index(heading) :])[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    wanted = set(keys(model)) - (set(keys(Recipe)) if model is recipe.ThinRecipe else set())  # those stand above
    tables = {name for name in wanted - listed if f"[{name}]" in text or f".{name}." in text}
    assert listed | tables == wanted
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert all(re.fullmatch(r"\| `\w+` \| [^|]+\. \| `[^|]+` \|", row) for row in rows)


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("## A package", recipe.SourceRecipe),
        ("### `[source]`", recipe.Source),
        ("### `[build]`", recipe.BuildSettings),
        ("### `[finish]`", recipe.Finish),
        ("### `[expect]`", recipe.Expect),
        ("### `[thin]`", recipe.Thin),
        ("### `[thin.stubs", recipe.Stub),
    ],
)
def test_the_reference_names_the_optional_keys(repository, heading, model):
    text = (repository / "docs" / "recipes.md").read_text()
    text = text[text.index(heading) :]
    for name, field in keys(model).items():
        row = next((line for line in text.splitlines() if line.startswith(f"| `{name}` |")), "")
        if row and name not in ("index", "url", "pool"):
            assert ("Default:" in row) == (not field.is_required()), name
