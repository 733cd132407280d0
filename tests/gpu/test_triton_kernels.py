"""vLLM's Triton kernels compile for 7.0 within Volta's limits, and a precompiled cache is complete.

The programs run in an environment with the wheelhouse's vLLM. No GPU is needed: a pretended driver reports 7.0, and no
kernel is launched.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkouts import ROOT, doit
from volta.triton_kernels import tables
from voltforge.gpu import triton_kernels
from voltforge.gpu.triton_kernels import KernelError
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.sources.environment import Environment
from voltforge.system import files
from voltforge.system.process import run


def python(vllm: Pipeline, installed: Environment, text: str, tmp_path: Path, *words: str) -> Any:
    """Run a program beside vLLM and return the JSON of its last line."""
    (tmp_path / "program.py").write_text(text)
    return json.loads(
        triton_kernels.run_python(vllm, installed, tmp_path / "program.py", *words).strip().splitlines()[-1]
    )


# Messages.


def test_kernel_over_a_limit_is_an_error_with_its_name_and_numbers() -> None:
    fine = {"case": "one", "kernel": "two", "problem": "", "seconds": 1.0}
    triton_kernels.check([fine])
    with pytest.raises(KernelError, match="one: two takes 300 registers"):
        triton_kernels.check([fine, {**fine, "problem": "one: two takes 300 registers, and the limit is 255"}])


BROKEN = """
import sys
from volta.triton_kernels import verified_cases, measure
verified_cases.other_cases = lambda: iter(())
verified_cases.attention = lambda: iter([verified_cases.Cache(kv_heads=1, head_size=64)])
verified_cases.Cache.call = lambda self, **_: {}[{}]
sys.exit(measure.main(["--jobs", "1"]))
"""


@pytest.mark.build
@pytest.mark.parametrize(
    ("fault", "message"),
    [("{}[0]", "KeyError"), ("None", "launches nothing, where reshape_and_cache_kernel_flash was expected")],
)
def test_case_that_fails_or_launches_nothing_is_an_error(
    vllm: Pipeline, installed: Environment, tmp_path: Path, fault: str, message: str
) -> None:
    """A newer vLLM can cause either."""
    (tmp_path / "broken.py").write_text(BROKEN.replace("{}[{}]", fault))
    with pytest.raises(KernelError, match=message):
        triton_kernels.check(triton_kernels.compile_kernels(vllm, installed, program=(tmp_path / "broken.py",)))


E4M3 = """
import json, torch
from volta import pretended_gpu
from volta.triton_kernels import attention, case, measure
pretended_gpu.capability()
case.DTYPES["e4m3"] = torch.float8_e4m3fn
with measure.compiler() as by:
    print(json.dumps([row.problem for row in by.rows(attention.Attention(
        dtype="fp16", kv="e4m3", head_size=64, heads=8, kv_heads=2, query=16))]))
"""


@pytest.mark.build
def test_kernel_that_does_not_compile_is_reported_with_its_configuration_and_the_compilers_message(
    vllm: Pipeline, installed: Environment, tmp_path: Path
) -> None:
    [output] = python(vllm, installed, E4M3, tmp_path)
    assert output.startswith("attention-2d dtype=fp16 kv=e4m3 head_size=64 heads=8 kv_heads=2 query=16: ")
    assert re.search(r"kernel_unified_attention_2d does not compile for 7\.0: .*fp8e4nv not supported", output)


def test_missing_wheel_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    with (
        pytest.raises(Exception, match="the wheelhouse has no vllm"),
        triton_kernels.installed_vllm(Pipeline.load(tmp_path, Settings())),
    ):
        pass


# Compiling.


@pytest.mark.build
def test_attention_of_every_head_size_fits_registers_and_48_kib(vllm: Pipeline, installed: Environment) -> None:
    rows = triton_kernels.compile_kernels(vllm, installed, "--tiles")
    assert {row["case"].split("head_size=")[1].split()[0] for row in rows} == {"64", "80", "96", "128", "256"}
    for row in rows:
        assert row["after"]["spill"] <= 8, row
        assert row["after"]["shared"] <= 48 << 10, row
        assert row["after"]["instructions"]["HMMA"] == 0
    table = tables.markdown(
        tables.TILES, tables.tiles([(row["attention"], row["before"], row["after"]) for row in rows])
    )
    assert table in (ROOT / "docs" / "kernels.md").read_text()
    spilled = [row["before"]["spill"] for row in rows]
    assert max(spilled) > 8000
    assert sum(spill > 500 for spill in spilled) >= 4


@pytest.mark.build
def test_every_kernel_is_within_the_limits_and_documented(vllm: Pipeline) -> None:
    output = doit("verify:triton")
    assert re.search(r"\d{3} cases", output)
    rows = json.loads((vllm.root / "build" / "triton.json").read_text())
    assert not [row["problem"] for row in rows if row["problem"]]
    assert max(row["shared"] for row in rows) <= 96 << 10
    assert max(row["registers"] for row in rows) <= 255
    assert not [row for row in rows if row["instructions"]["HMMA"]]
    written = (ROOT / "docs" / "kernels.md").read_text()
    assert tables.markdown(tables.HEADINGS, tables.summary(rows)) in written
    assert tables.counted(rows) in written


SAME_CODE = """
import importlib.util, json, pathlib, sys
from volta import pretended_gpu
from volta.triton_kernels.attention import Attention
from volta.triton_kernels.case import Tensors
import triton
triton.knobs.compilation.disable_line_info = True
from vllm.attention.ops import triton_unified_attention as ours
stock = pathlib.Path(sys.argv[0]).with_name("stock.py")
code = {}
for name, source in {"ours": pathlib.Path(ours.__file__), "stock": stock}.items():
    spec = importlib.util.spec_from_file_location(ours.__name__, source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code[name] = []
    for capability in ((7, 5), (8, 0), (8, 9)):
        pretended_gpu.capability(capability)
        for size, heads, query, window in ((256, 8, 16, 100), (128, 48, 1, None)):
            case = Attention(dtype="fp16", head_size=size, heads=heads, kv_heads=1, query=query, window=window)
            with pretended_gpu.launches() as seen:
                module.unified_attention(**case.tensors(Tensors()))
            code[name] += [launch.kernel.asm["ptx"] for launch in seen]
print(json.dumps(code))
"""


@pytest.mark.build
def test_patches_do_not_change_the_code_for_other_capabilities(
    vllm: Pipeline, installed: Environment, tmp_path: Path
) -> None:
    """0015-attention-tiles and 0017-window-maximum."""
    patched = installed.site_packages / "vllm/attention/ops/triton_unified_attention.py"
    (tmp_path / "stock.py").write_bytes(patched.read_bytes())
    for patch in ("0017-window-maximum", "0015-attention-tiles"):
        source = vllm.root / "patches" / "vllm" / f"{patch}.patch"
        run(["patch", "--reverse", "--fuzz=0", "--posix", tmp_path / "stock.py", source])
    assert files.sha256(patched) != files.sha256(tmp_path / "stock.py")
    code = python(vllm, installed, SAME_CODE, tmp_path)
    assert code["ours"] == code["stock"]
    assert len(code["ours"]) == 9


# The precompiled cache.

CONFIG = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 1024, "head_dim": 128}


@pytest.fixture(scope="module")
def cache(vllm: Pipeline, installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A precompiled cache for one small model; its final path is /nowhere."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    precompile(vllm, installed, folder, "--at", "/nowhere")
    return folder


@pytest.fixture
def brought(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder into which the image's start script has copied that cache."""
    folder, start = tmp_path / "brought", start_script()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "triton-cache").symlink_to(cache / "cache")
    monkeypatch.setattr(start, "HERE", folder)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    start.bring_cache()
    return folder


def precompile(vllm: Pipeline, installed: Environment, folder: Path, *words: str) -> str:
    return triton_kernels.run_python(
        vllm, installed, "-m", "volta.triton_kernels.precompile", "--cache", folder / "cache",
        "--model", folder / "config.json", "--tensor-parallel", "1", *words,
    )  # fmt: skip


@pytest.mark.build
def test_later_process_finds_all_kernels_and_launchers_in_the_cache(
    vllm: Pipeline, installed: Environment, brought: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = precompile(vllm, installed, brought, "--check")
    assert re.search(r"\d+ kernels, all in the cache", output)
    monkeypatch.setenv("PATH", "")  # without the program `file`, by which a launcher's key tells ELF
    assert re.search(r"\d+ kernels, all in the cache", precompile(vllm, installed, brought, "--check"))
    next((brought / "cache").glob("*/kernel_unified_attention_2d.cubin")).parent.rename(brought / "gone")
    with pytest.raises(KernelError, match="kernel_unified_attention_2d: it is not in the cache"):
        precompile(vllm, installed, brought, "--check")


OF_A_LAYER = """
import json, sys, types, torch
from pathlib import Path
from volta import pretended_gpu
from volta.triton_kernels import precompile
pretended_gpu.capability()
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl, TritonAttentionMetadata
found = set()
for kind, dtype in ("auto", torch.float16), ("fp8_e5m2", torch.uint8):
    layer = types.SimpleNamespace(_k_scale=torch.tensor(1.0), _v_scale=torch.tensor(1.0), _q_scale_float=1.0)
    attention = TritonAttentionImpl(8, 128, 128**-0.5, 2, None, None, kind)
    shape = TritonAttentionBackend.get_kv_cache_shape(4000, 16, 2, 128, kind)
    cache = torch.empty(shape, dtype=dtype)
    for new in ([1], [1, 1, 1], [1] * 16, [17, 5], [300], [1] * 130):
        tokens, count = sum(new), len(new)
        query, key, value = torch.empty(tokens, 12 * 128, dtype=torch.float16).split([1024, 256, 256], dim=-1)
        starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lengths = torch.tensor([one + 70 for one in new], dtype=torch.int32)
        metadata = TritonAttentionMetadata(
            num_actual_tokens=tokens, max_query_len=max(new), query_start_loc=starts, max_seq_len=max(new) + 70,
            seq_lens=lengths, block_table=torch.zeros(256, 256, dtype=torch.int32)[:count],
            slot_mapping=torch.zeros(tokens, dtype=torch.int64), use_cascade=False, common_prefix_len=0,
            cu_prefix_query_lens=None, prefix_kv_lens=None, suffix_kv_lens=None)
        heads = (one.view(tokens, -1, 128) for one in (query, key, value))
        with precompile.only_from(Path(sys.argv[1])), pretended_gpu.launches() as seen:
            attention.forward(layer, *heads, cache, metadata, output=torch.empty(tokens, 8, 128, dtype=torch.float16))
        found |= {launch.function for launch in seen}
print(json.dumps(sorted(found)))
"""


@pytest.mark.build
def test_kernels_of_a_models_attention_layer_are_in_the_cache(
    vllm: Pipeline, installed: Environment, brought: Path, tmp_path: Path
) -> None:
    """The layer is called as a server does: several batches, keys and values from one projection, a paged cache."""
    found = python(vllm, installed, OF_A_LAYER, tmp_path, str(brought / "cache"))
    attention = ["kernel_unified_attention_2d", "kernel_unified_attention_3d", "reduce_segments"]
    assert found == [*attention, "reshape_and_cache_kernel_flash"]


def start_script() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("start", ROOT / "docker" / "start.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.build
def test_cache_does_not_depend_on_the_machine(
    vllm: Pipeline, installed: Environment, cache: Path, tmp_path: Path
) -> None:
    for path in (cache / "cache").rglob("*"):
        if path.is_file():
            assert str(installed.path).encode() not in path.read_bytes(), path
            assert str(cache).encode() not in path.read_bytes(), path
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    precompile(vllm, installed, tmp_path, "--at", "/nowhere")
    assert content(tmp_path / "cache") == content(cache / "cache")


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.build
def test_model_that_is_not_a_transformer_is_an_error(vllm: Pipeline, installed: Environment, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(KernelError, match="--model has no 'num_attention_heads'"):
        precompile(vllm, installed, tmp_path)


# Coverage of the kernels by cases.

CASES = [
    statement
    for path in sorted((ROOT / "volta/triton_kernels").glob("*.py"))
    for statement in ast.parse(path.read_text()).body
]
"""The statements of the modules. They are read and not imported: torch is not in the environment of the tests."""
Place = tuple[str, str]
"""A Triton function: its file and its name."""


def not_covered() -> dict[str, str]:
    (found,) = [case.value for case in CASES if isinstance(case, ast.Assign) and "NOT_COVERED" in ast.unparse(case)]
    read: dict[str, str] = ast.literal_eval(found)
    return read


def kernels_of_cases() -> set[str]:
    """The names in the ``kernels`` of every case."""
    definitions = [
        one
        for case in CASES
        if isinstance(case, ast.ClassDef)
        for one in case.body
        if (isinstance(one, ast.FunctionDef) and one.name == "kernels")
        or (isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "kernels")
    ]
    constants = [
        node.value for definition in definitions for node in ast.walk(definition) if isinstance(node, ast.Constant)
    ]
    return {value for value in constants if isinstance(value, str)}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield the Triton functions of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            decorators = [one.func if isinstance(one, ast.Call) else one for one in node.decorator_list]
            if {"triton.jit", "jit"} & {ast.unparse(decorator) for decorator in decorators}:
                yield node


def called(tree: ast.Module, file: str) -> dict[Place, set[Place]]:
    """Return the Triton functions of a module, each with the functions that it calls, also imported ones."""
    origin = {
        name.asname or name.name: (f"{node.module.replace('.', '/')}.py", name.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for name in node.names
    }
    found: dict[Place, set[Place]] = {}
    for function in functions(tree):
        names = {
            node.func.id
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        found[file, function.name] = {origin.get(name, (file, name)) for name in names}
    return found


@pytest.mark.build
def test_every_triton_kernel_of_the_wheel_has_a_case_or_is_listed_as_not_covered(vllm: Pipeline) -> None:
    (kept,) = [wheel for wheel in vllm.wheelhouse.wheels() if wheel.name == "vllm"]
    calls: dict[Place, set[Place]] = {}
    with zipfile.ZipFile(kept.path) as archive:
        for file in archive.namelist():
            if file.endswith(".py") and b"triton" in (text := archive.read(file)):
                calls |= called(ast.parse(text), file)
    wanted = kernels_of_cases()
    covered = {place for place in calls if place[1] in wanted}
    assert sorted(name for _, name in covered) == sorted(wanted), "each name is of one kernel"
    while helpers := {call for place in covered for call in calls[place] if call in calls} - covered:
        covered |= helpers
    words = [word for key in not_covered() for word in key.split(", ") if "'s" not in word]
    left = {place: [word for word in words if word in "/".join(place)] for place in calls.keys() - covered}
    assert not sorted(place for place, named in left.items() if not named)
    assert {*words} == {word for named in left.values() for word in named}, "what is named is there"
