"""The provenance of a wheel: an in-toto statement (v1) with SLSA's predicate (v1).

It is made from a receipt alone: equal receipts give equal statements, on any machine and day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from voltforge import PIPELINE_VERSION
from voltforge.errors import VoltforgeError
from voltforge.sources.materials import Material, MaterialError, from_json
from voltforge.system import files

# in-toto's classes and protobuf take a tenth of a second to import, so each function imports what it needs.

PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:voltforge:wheel:1"
"""The type that defines the parameters of a statement."""
BUILDER = "urn:voltforge:pipeline:"
"""The prefix of the builder's id; the pipeline's version follows."""
CHOSEN = ("arch", "config_settings", "thin", "variables")
"""The inputs that the recipe decides directly, SLSA's external parameters; the key is a digest of all inputs."""
NEEDED = ("file", "name", "version", "sha256", "build_key", "materials", "sbom")
"""The required results of a receipt."""
OPTIONAL = ("hermetic", "sandbox", "build")
"""The optional results."""
PERMITTED = "permitted_sha256"
"""The annotation of a material with several hashes."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+!~-]{0,250}")


class ProvenanceError(VoltforgeError):
    """A statement that does not describe one wheel, or a receipt that cannot be stated."""


@dataclass(frozen=True)
class Provenance:
    """The content of a statement."""

    file: str
    """The wheel's file name, without folders and special characters."""
    sha256: str
    name: str
    version: str
    key: str
    """The key of the stage that kept the wheel."""
    build_key: str
    """The key of the stage that built it."""
    hermetic: bool | None
    """True if the build had no network; ``None`` where nothing was compiled."""
    build: Any
    """The result of the build stage, as in the receipt, or ``None``."""
    materials: tuple[Material, ...]
    sbom: Mapping[str, str]
    """``file`` and ``sha256`` of the wheel's SBOM."""


def statement(receipt: Mapping[str, Any]) -> bytes:
    """Return the statement for a receipt, as canonical JSON.

    Raises:
        ProvenanceError: the receipt lacks something, or holds something that a statement cannot.
    """
    from in_toto_attestation.v1.statement import Statement  # type: ignore[import-untyped]

    results = receipt.get("results", {})
    if missing := [name for name in NEEDED if not results.get(name)]:
        what = f"the receipt of {receipt.get('stage', 'a wheel')} lacks {', '.join(missing)}"
        raise ProvenanceError(what, hint="an older voltforge wrote it: remove it and run the stage again")
    try:
        receipt = json.loads(json.dumps(receipt, allow_nan=False))
        subject = _descriptor(results["file"], sha256=[results["sha256"]])
        message = Statement([subject], PREDICATE_TYPE, _dict(_predicate(receipt)))
        message.validate()
        payload = json.dumps(_dict(message.pb), sort_keys=True, separators=(",", ":")).encode()
        # Its numbers are doubles (struct.proto): an integer beyond 2^53 would change.
        if read(payload).build != receipt["results"].get("build"):
            raise ProvenanceError("its build has a number that is too large")
    except (VoltforgeError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise ProvenanceError(f"the provenance of {results['file']} cannot be written: {_one_line(error)}") from error
    return payload


def read(payload: bytes) -> Provenance:
    """Parse a statement; signatures are not checked here.

    Raises:
        ProvenanceError: it is not a statement of voltforge on one wheel.
    """
    subject, predicate = _parsed(payload)
    definition, details = predicate.build_definition, predicate.run_details
    if definition.build_type != BUILD_TYPE:
        raise ProvenanceError(f"the statement is on another kind of build: {definition.build_type[:80]!r}")
    if not re.fullmatch(rf"{BUILDER}[0-9]{{1,9}}", details.builder.id):
        raise ProvenanceError(f"the statement names another builder: {details.builder.id[:80]!r}")
    if len(details.byproducts) != 1:
        raise ProvenanceError(f"the statement has {len(details.byproducts)} by-products, not one SBOM")
    outer, inner = _dict(definition.external_parameters), _dict(definition.internal_parameters)
    if not isinstance(inner.get("hermetic"), (bool, type(None))):
        raise ProvenanceError("the statement does not say whether the build was hermetic")
    return Provenance(
        **_wheel(subject, outer), sha256=_sha256(subject),
        key=_key(inner, "key"), build_key=_key(inner, "build_key"),
        hermetic=inner.get("hermetic"), build=inner.get("build"),
        materials=tuple(map(_material, definition.resolved_dependencies)),
        sbom={"file": _file(details.byproducts[0]), "sha256": _sha256(details.byproducts[0])},
    )  # fmt: skip


def _predicate(receipt: Mapping[str, Any]) -> Any:
    """Return SLSA's predicate for a receipt."""
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2  # type: ignore[import-untyped]

    inputs, results = receipt["inputs"], receipt["results"]
    predicate = provenance_pb2.Provenance()
    definition, details = predicate.build_definition, predicate.run_details
    definition.build_type = BUILD_TYPE
    chosen = {name: inputs[name] for name in CHOSEN if name in inputs}
    definition.external_parameters.update({"name": results["name"], "version": results["version"], **chosen})
    built = {name: results[name] for name in ("build_key", *OPTIONAL) if name in results}
    definition.internal_parameters.update({"key": receipt["key"], "inputs_sha256": files.digest(inputs), **built})
    for material in map(from_json, results["materials"]):
        version = {"version": material.version} if material.version else {}
        descriptor = _descriptor(material.name, material.uri, material.sha256, kind=material.kind, **version)
        definition.resolved_dependencies.append(descriptor)
    details.builder.id = f"{BUILDER}{PIPELINE_VERSION}"
    details.metadata.invocation_id = f"{receipt['stage']}:{receipt['key']}"
    details.byproducts.append(_descriptor(results["sbom"]["file"], sha256=[results["sbom"]["sha256"]]))
    return predicate


def _descriptor(name: str, uri: str = "", sha256: Sequence[str] = (), **annotations: Any) -> Any:
    """Return in-toto's descriptor of a file: with a digest if its hash is known, annotated if one of several is
    permitted.
    """
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor  # type: ignore[import-untyped]

    digest = {"sha256": sha256[0]} if len(sha256) == 1 else None
    if len(sha256) > 1:
        annotations[PERMITTED] = list(sha256)
    return ResourceDescriptor(name, uri, digest, annotations=annotations).pb


def _material(descriptor: Any) -> Material:
    """Return the material of a descriptor."""
    value = _dict(descriptor.annotations)
    permitted = value.pop(PERMITTED, [])
    if descriptor.digest:
        permitted = [_sha256(descriptor)] if not permitted else None
    try:
        return from_json({**value, "name": descriptor.name, "uri": descriptor.uri, "sha256": permitted})
    except MaterialError as error:
        raise ProvenanceError(f"the statement has a material that cannot be read: {error}") from error


def _parsed(payload: bytes) -> tuple[Any, Any]:
    """Parse the one subject and the predicate of a statement, by the messages that define both; other fields are
    refused.
    """
    from google.protobuf.json_format import Parse, ParseDict  # type: ignore[import-untyped]
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2  # type: ignore[import-untyped]
    from in_toto_attestation.v1.statement import Statement

    try:
        message = Statement.copy_from_pb(Parse(payload, statement_pb2.Statement()))
        message.validate()
        if message.pb.predicate_type != PREDICATE_TYPE:
            raise ProvenanceError(f"the statement has another predicate: {message.pb.predicate_type[:80]!r}")
        predicate = ParseDict(_dict(message.pb.predicate), provenance_pb2.Provenance())
    except ProvenanceError:
        raise
    except Exception as error:
        # json_format raises its own errors, and Python's for absurd input.
        raise ProvenanceError(f"it is not an in-toto statement with SLSA provenance: {_one_line(error)}") from error
    if len(message.pb.subject) != 1:
        raise ProvenanceError(f"the statement is on {len(message.pb.subject)} files, not on one wheel")
    return message.pb.subject[0], predicate


def _wheel(subject: Any, outer: Mapping[str, Any]) -> dict[str, str]:
    """Return file, name and version, which must agree."""
    file, name, version = _file(subject), outer.get("name"), outer.get("version")
    try:
        stated, expected = (canonicalize_name(str(name)), Version(str(version))), parse_wheel_filename(file)[:2]
    except ValueError as error:
        raise ProvenanceError(f"the statement is not on a wheel: {_one_line(error)}") from error
    if stated != expected or stated[0] != name:
        raise ProvenanceError(f"the statement on {file} says that it is {name!r} {version!r}"[:300])
    return {"file": file, "name": str(name), "version": str(version)}


def _file(descriptor: Any) -> str:
    """Return a name that is safe in any folder."""
    if not _NAME.fullmatch(descriptor.name):
        raise ProvenanceError(f"the statement has an invalid file name: {descriptor.name[:80]!r}")
    return str(descriptor.name)


def _sha256(descriptor: Any) -> str:
    digests = dict(descriptor.digest)
    if digests.keys() != {"sha256"} or not _SHA256.fullmatch(digests["sha256"]):
        raise ProvenanceError(f"the statement has no SHA-256 of {descriptor.name[:80]!r}, or other digests as well")
    return str(digests["sha256"])


def _key(inner: Mapping[str, Any], name: str) -> str:
    value = inner.get(name)
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ProvenanceError(f"the statement has no {name}")
    return value


def _dict(message: Any) -> dict[str, Any]:
    """Return a message as JSON values."""
    from google.protobuf.json_format import MessageToDict

    return dict(_with_integers(MessageToDict(message)))


def _with_integers(value: Any) -> Any:
    """Return JSON with whole numbers as integers, as RFC 8785 writes them, and sorted names."""
    if isinstance(value, dict):
        return {name: _with_integers(value[name]) for name in sorted(value)}
    if isinstance(value, list):
        return list(map(_with_integers, value))
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53 else value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
