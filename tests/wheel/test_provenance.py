"""Tests of statements: made from receipts, parsed by in-toto's own messages, refused if invalid."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.json_format import Parse, ParseDict
from hypothesis import given, settings
from hypothesis import strategies as st
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement

from voltforge import PIPELINE_VERSION
from voltforge.sources.materials import KINDS, Material, as_json
from voltforge.system import files
from voltforge.wheel import provenance
from voltforge.wheel.provenance import Provenance, ProvenanceError

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
ROW = "corrupt inputs refused: provenance and signatures"
SOURCE = Material("vllm", "source", "0.12.0", "pkg:pypi/vllm@0.12.0", (C,))
CMAKE = Material("cmake", "package", "3.31.10", "pkg:pypi/cmake@3.31.10", (A, B))
TOOL = Material("gcc", "compiler", "12.2.0")
RECEIPT = {
    "stage": "wheels:vllm",
    "key": A,
    "inputs": {
        "arch": ["7.0"],
        "variables": {"MAX_JOBS": "2", "TORCH_CUDA_ARCH_LIST": "7.0"},
        "toolchain": {"bin/nvcc": D},
        "expect": {"max_size": 20_000_000},
    },
    "results": {
        "file": "vllm-0.12.0+sm70-cp38-abi3-manylinux_2_34_x86_64.whl",
        "name": "vllm",
        "version": "0.12.0+sm70",
        "sha256": B,
        "size": 8_807_975,
        "hermetic": True,
        "sandbox": "bubblewrap",
        "build_key": C,
        "build": {"linked": {"vllm/_C.abi3.so": 27}, "commit": None, "usage": {"cpu": 643.89553, "peak": 1998819328}},
        "materials": [as_json(material) for material in (SOURCE, CMAKE, TOOL)],
        "sbom": {"file": "vllm-0.12.0+sm70-cp38-abi3-manylinux_2_34_x86_64.whl.cdx.json", "sha256": D},
        "findings": [{"check": "wheel", "detail": "1589 files", "severity": "pass"}],
        "linked": {"vllm/_C.abi3.so": 27},
    },
}  # fmt: skip

HASHES = st.text("0123456789abcdef", min_size=64, max_size=64)
URIS = st.sampled_from(["", "pkg:pypi/torch@2.9.0", "https://example.invalid/a.tar.gz"])
MATERIALS = st.builds(
    Material, st.text(min_size=1), st.sampled_from(KINDS), st.text(), URIS, st.lists(HASHES, max_size=3).map(tuple)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def receipt(**results: Any) -> dict[str, Any]:
    """Return the receipt with changed results; ``None`` removes a result."""
    changed = {**RECEIPT["results"], **results}
    return {**RECEIPT, "results": {name: value for name, value in changed.items() if value is not None}}


def told(**results: Any) -> Provenance:
    return provenance.read(provenance.statement(receipt(**results)))


@pytest.fixture(scope="module")
def statement() -> dict[str, Any]:
    return json.loads(provenance.statement(RECEIPT))


# --- content ---


def test_statement_is_read_back_as_provenance():
    results = RECEIPT["results"]
    assert told() == Provenance(
        file=results["file"], sha256=B, name="vllm", version="0.12.0+sm70", key=A, build_key=C, hermetic=True,
        build=results["build"], materials=(SOURCE, CMAKE, TOOL), sbom=results["sbom"],
    )  # fmt: skip


def test_statement_parses_as_in_toto_and_slsa_messages(statement):
    parsed = Parse(json.dumps(statement), statement_pb2.Statement())
    Statement.copy_from_pb(parsed).validate()
    predicate = ParseDict(statement["predicate"], provenance_pb2.Provenance())
    assert parsed.predicate_type == "https://slsa.dev/provenance/v1"
    assert predicate.build_definition.build_type == "urn:voltforge:wheel:1"
    assert predicate.run_details.builder.id == f"urn:voltforge:pipeline:{PIPELINE_VERSION}"
    assert predicate.run_details.metadata.invocation_id == f"wheels:vllm:{A}"
    assert [dict(byproduct.digest) for byproduct in predicate.run_details.byproducts] == [{"sha256": D}]


def test_subject_is_the_wheel(statement):
    assert statement["subject"] == [{"name": RECEIPT["results"]["file"], "digest": {"sha256": B}}]


def test_recipe_inputs_are_external_parameters_and_the_rest_internal(statement):
    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"] == {
        "name": "vllm", "version": "0.12.0+sm70", "arch": ["7.0"], "variables": RECEIPT["inputs"]["variables"],
    }  # fmt: skip
    assert definition["internalParameters"] == {
        "key": A, "build_key": C, "hermetic": True, "sandbox": "bubblewrap", "build": RECEIPT["results"]["build"],
        "inputs_sha256": files.digest(RECEIPT["inputs"]),
    }  # fmt: skip


def test_material_has_its_digest_or_its_permitted_digests(statement):
    assert statement["predicate"]["buildDefinition"]["resolvedDependencies"] == [
        {
            "name": "vllm", "uri": "pkg:pypi/vllm@0.12.0", "digest": {"sha256": C},
            "annotations": {"kind": "source", "version": "0.12.0"},
        },
        {
            "name": "cmake", "uri": "pkg:pypi/cmake@3.31.10",
            "annotations": {"kind": "package", "version": "3.31.10", "permitted_sha256": [A, B]},
        },
        {"name": "gcc", "annotations": {"kind": "compiler", "version": "12.2.0"}},
    ]  # fmt: skip


def test_statement_has_no_timestamp(statement):
    assert [*statement["predicate"]["runDetails"]["metadata"]] == ["invocationId"]


def test_hermetic_is_none_if_nothing_was_compiled():
    parsed = told(hermetic=None, sandbox=None, build=None)
    assert (parsed.hermetic, parsed.build) == (None, None)
    assert told(hermetic=False).hermetic is False


# --- round trip ---


def test_equal_receipts_give_equal_statements():
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: turned(value[name]) for name in reversed(value)}
        return value

    assert provenance.statement(turned(RECEIPT)) == provenance.statement(RECEIPT)
    assert provenance.statement(json.loads(json.dumps(RECEIPT))) == provenance.statement(RECEIPT)


def test_changed_inputs_or_materials_give_another_statement():
    statements = {provenance.statement(changed_receipt) for changed_receipt in (
        RECEIPT, {**RECEIPT, "inputs": {**RECEIPT["inputs"], "expect": {}}}, {**RECEIPT, "key": B},
        receipt(materials=[as_json(SOURCE)]), receipt(build=None),
    )}  # fmt: skip
    assert len(statements) == 5


@settings(deadline=None)
@given(JSON.filter(lambda value: value is not None), st.lists(MATERIALS, min_size=1, max_size=4))
def test_build_result_and_materials_are_read_back_unchanged(build, materials):
    parsed = told(build=build, materials=[as_json(material) for material in materials])
    assert parsed.build == build
    assert parsed.materials == tuple(materials)


def test_whole_numbers_are_read_back_as_integers():
    assert repr(told(build={"linked": [27, 0, -3], "wall": 2.5}).build) == "{'linked': [27, 0, -3], 'wall': 2.5}"


@settings(deadline=None)
@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789_", min_size=1, max_size=9), st.integers(0, 99), st.booleans())
def test_statement_of_any_wheel_name_is_read_back(name, number, hermetic):
    name = f"a{name}z".replace("__", "_")
    parsed = told(
        file=f"{name}-1.{number}-py3-none-any.whl",
        name=name.replace("_", "-"),
        version=f"1.{number}",
        hermetic=hermetic,
    )
    assert (parsed.name, parsed.version, parsed.hermetic) == (name.replace("_", "-"), f"1.{number}", hermetic)


# --- invalid receipts ---


@pytest.mark.parametrize("name", provenance.NEEDED)
def test_missing_result_of_a_receipt_is_reported(name):
    with pytest.raises(ProvenanceError) as refusal:
        provenance.statement(receipt(**{name: None}))
    assert refusal.value.what == f"the receipt of wheels:vllm lacks {name}"
    assert refusal.value.hint


@pytest.mark.parametrize(
    "results",
    [
        {"build": 2**60 + 1}, {"build": [float("nan")]}, {"build": {"a": {1}}}, {"build": "\ud800"},
        {"materials": [{"name": "x"}]}, {"materials": "x"}, {"sbom": {"file": "a"}}, {"sbom": "x"},
        {"sha256": B[1:]}, {"name": "torch"}, {"version": "0.12.0"}, {"build_key": "x"}, {"hermetic": "yes"},
        {"file": "vllm.tar.gz"}, {"file": "../vllm-0.12.0+sm70-cp38-abi3-any.whl"}, {"file": 1},
    ],
    ids=str,
)  # fmt: skip
def test_invalid_receipt_is_refused(results):
    with pytest.raises(ProvenanceError, match="cannot be written: "):
        provenance.statement(receipt(**results))


def test_empty_receipt_is_refused():
    with pytest.raises(ProvenanceError, match="lacks file, name, version"):
        provenance.statement({})
    with pytest.raises(ProvenanceError, match="cannot be written"):
        provenance.statement({"results": RECEIPT["results"]})


# --- invalid statements ---

SUBJECT, PREDICATE = ("subject",), ("predicate",)
DEFINITION, DETAILS = ("predicate", "buildDefinition"), ("predicate", "runDetails")
OUTER, INNER = (*DEFINITION, "externalParameters"), (*DEFINITION, "internalParameters")
FIRST = (*DEFINITION, "resolvedDependencies", 0)
SBOM = (*DETAILS, "byproducts", 0)
GONE = object()
WRONG = [
    (("_type",), "https://in-toto.io/Statement/v0.1", "Wrong statement type"),
    (("_type",), GONE, "Wrong statement type"),
    (("predicateType",), "https://slsa.dev/provenance/v0.2", "another predicate"),
    (("predicateType",), GONE, "Predicate type required"),
    (PREDICATE, GONE, "Predicate object required"),
    (PREDICATE, [], "not an in-toto statement"),
    (SUBJECT, GONE, "At least one subject"),
    (SUBJECT, [], "At least one subject"),
    (SUBJECT, [{"name": "a", "digest": {"sha256": A}}] * 2, "on 2 files"),
    ((*SUBJECT, 0, "digest"), GONE, "At least one digest"),
    ((*SUBJECT, 0, "digest"), {"sha1": "a" * 40}, "no SHA-256"),
    ((*SUBJECT, 0, "digest"), {"sha256": A, "sha512": A * 2}, "no SHA-256 of .*, or other digests"),
    ((*SUBJECT, 0, "digest", "sha256"), A.upper(), "no SHA-256"),
    ((*SUBJECT, 0, "digest", "sha256"), A[1:], "no SHA-256"),
    ((*SUBJECT, 0, "digest", "sha256"), "", "no SHA-256"),
    ((*SUBJECT, 0, "name"), GONE, "invalid file name"),
    ((*SUBJECT, 0, "name"), "../vllm-0.12.0+sm70-cp38-abi3-any.whl", "invalid file name"),
    ((*SUBJECT, 0, "name"), "/vllm-0.12.0+sm70-cp38-abi3-any.whl", "invalid file name"),
    ((*SUBJECT, 0, "name"), ".vllm-0.12.0+sm70-cp38-abi3-any.whl", "invalid file name"),
    ((*SUBJECT, 0, "name"), "vllm-0.12.0+sm70-cp38-abi3-any.whl\n", "invalid file name"),
    ((*SUBJECT, 0, "name"), "v" * 300, "invalid file name"),
    ((*SUBJECT, 0, "name"), "vllm-0.12.0+sm70.tar.gz", "not on a wheel"),
    ((*SUBJECT, 0, "name"), "torch-0.12.0+sm70-cp38-abi3-any.whl", "says that it is 'vllm'"),
    ((*SUBJECT, 0, "name"), "vllm-0.13.0-cp38-abi3-any.whl", "says that it is 'vllm' '0.12.0"),
    ((*SUBJECT, 0, "more"), 1, "no field named"),
    ((*DEFINITION, "buildType"), "urn:voltforge:wheel:2", "another kind of build"),
    ((*DEFINITION, "buildType"), GONE, "another kind of build"),
    ((*DEFINITION, "more"), 1, "no field named"),
    (OUTER, GONE, "not on a wheel"),
    ((*OUTER, "name"), GONE, "says that it is None"),
    ((*OUTER, "name"), "VLLM", "says that it is 'VLLM'"),
    ((*OUTER, "version"), "newest", "not on a wheel"),
    (INNER, GONE, "has no key"),
    ((*INNER, "key"), GONE, "has no key"),
    ((*INNER, "key"), "../" + A, "has no key"),
    ((*INNER, "build_key"), 1, "has no build_key"),
    ((*INNER, "build_key"), A[1:], "has no build_key"),
    ((*INNER, "hermetic"), "yes", "hermetic"),
    ((*INNER, "hermetic"), 1, "hermetic"),
    (FIRST, {}, "material"),
    ((*FIRST, "name"), GONE, "material"),
    ((*FIRST, "annotations"), GONE, "material"),
    ((*FIRST, "annotations", "kind"), "tool", "material"),
    ((*FIRST, "annotations", "more"), "x", "material"),
    ((*FIRST, "annotations", "permitted_sha256"), [A, B], "material"),
    ((*FIRST, "digest"), {"md5": "a" * 32}, "no SHA-256"),
    ((*FIRST, "uri"), "file:///etc/passwd", "material"),
    ((*DETAILS, "builder"), GONE, "another builder"),
    ((*DETAILS, "builder", "id"), "https://example.invalid/builder", "another builder"),
    ((*DETAILS, "builder", "id"), "urn:voltforge:pipeline:1x", "another builder"),
    ((*DETAILS, "metadata", "startedOn"), "yesterday", "not an in-toto statement"),
    ((*DETAILS, "byproducts"), GONE, "0 by-products"),
    ((*DETAILS, "byproducts"), [{"name": "a", "digest": {"sha256": A}}] * 2, "2 by-products"),
    ((*SBOM, "digest"), GONE, "no SHA-256"),
    ((*SBOM, "name"), "a/b", "invalid file name"),
    (("more",), 1, "no field named"),
]  # fmt: skip


def changed(statement: dict[str, Any], path: tuple, value: Any) -> bytes:
    """Return the statement with a changed or removed value at a path."""
    copied = copy.deepcopy(statement)
    place = copied
    for step in path[:-1]:
        place = place[step]
    if value is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(copied).encode()


@pytest.mark.parametrize(
    ("path", "value", "message"), WRONG, ids=lambda part: str(part)[:40] if part != GONE else "gone"
)
def test_invalid_statement_is_refused(statement, counted, path, value, message):
    with pytest.raises(ProvenanceError, match=message) as refusal:
        provenance.read(changed(statement, path, value))
    assert "\n" not in refusal.value.what
    assert len(refusal.value.what) < 500
    counted(ROW)


def paths(value: Any, before: tuple = ()) -> Iterator[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, one in inner:
        yield (*before, step)
        yield from paths(one, (*before, step))


def test_statement_with_any_value_replaced_is_read_or_refused(statement, counted):
    refused = 0
    for path in paths(statement):
        for value in (GONE, None, True, 0, -1.5, "", "x", [], {}, [[]], {"x": {}}):
            try:
                provenance.read(changed(statement, path, value))
            except ProvenanceError:
                refused += 1
    assert refused > 300
    counted(ROW, refused)


def test_truncated_statement_is_refused(statement, counted):
    payload = provenance.statement(RECEIPT)
    for end in range(0, len(payload), 5):
        with pytest.raises(ProvenanceError, match="not an in-toto statement"):
            provenance.read(payload[:end])
        counted(ROW)


def test_document_that_is_not_a_statement_is_refused(counted):
    payload = provenance.statement(RECEIPT)
    documents = [b"[]", b"{}", b"null", b"1", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"predicate":' * 100_000]
    documents += [payload + b"x", payload * 2, payload.replace(b'"_type"', b'"_type":"","_type"')]
    documents += [payload.replace(b'"hermetic":true', b'"hermetic":NaN')]
    for bad in documents:
        with pytest.raises(ProvenanceError):
            provenance.read(bad)
    counted(ROW, len(documents))


@settings(deadline=None)
@given(st.binary())
def test_arbitrary_bytes_are_refused(content):
    with pytest.raises(ProvenanceError, match="not an in-toto statement"):
        provenance.read(content)
