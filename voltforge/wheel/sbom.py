"""The SBOM of a wheel as CycloneDX 1.6: its content, its requirements, and its materials.

The wheel is the described component. Its pedigree holds the source and the patches. Of the other components, native
binaries and requirements have the scope "required", and what built the wheel has the scope "excluded".
"""

from __future__ import annotations

import functools
import json
import re
import uuid
import warnings
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from email import message_from_bytes, policy
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from voltforge import PIPELINE_VERSION
from voltforge.binary import elf
from voltforge.errors import VoltforgeError, listed
from voltforge.sources.materials import Material, as_json
from voltforge.system import files
from voltforge.wheel import wheelfile

if TYPE_CHECKING:
    from cyclonedx.model import ExternalReference, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentScope, ComponentType, Patch, Pedigree

# cyclonedx takes a fifth of a second to import, so each function imports what it needs.

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:voltforge:sbom")
"""The namespace of serial numbers, which are made from the content (RFC 9562, version 5)."""


class SbomError(VoltforgeError):
    """A wheel that cannot be described."""


def describe(folder: Path, *, name: str, version: str, materials: Sequence[Material], epoch: int) -> bytes:
    """Return the SBOM of an unpacked wheel and its materials as JSON; equal inputs give equal bytes.

    Args:
        folder: the unpacked wheel, with one ``*.dist-info`` folder.
        name: the project, normalized.
        version: its version.
        materials: what the wheel is made of and with, in any order.
        epoch: seconds since 1970 that stand for the build time (SOURCE_DATE_EPOCH).

    Raises:
        SbomError: METADATA cannot be read, or something has no place in CycloneDX.
        WheelError: it is not an unpacked wheel, or holds something that a wheel cannot.
    """
    from cyclonedx.exception import CycloneDxException
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion

    try:
        with warnings.catch_warnings():
            # The library would make every wheel depend on something.
            warnings.filterwarnings("ignore", "The Component this BOM is describing", UserWarning)
            bom = _bom(folder, name, version, sorted(set(materials)), epoch)
            text = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    except (CycloneDxException, ValueError, OverflowError) as error:
        raise SbomError(f"{name} {version} cannot be described as CycloneDX: {error}") from error
    document = json.loads(text)
    document["serialNumber"] = ""
    document["serialNumber"] = uuid.uuid5(_NAMESPACE, files.digest(document)).urn
    encoded = json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"
    if violations := problems(encoded):
        raise SbomError(f"the SBOM of {name} {version} is not valid CycloneDX 1.6:{listed(violations)}")
    return encoded


def problems(document: bytes) -> list[str]:
    """Return the violations of CycloneDX 1.6's schema in a document, a sentence each; none if it is valid."""
    try:
        errors = _validator().validate_str(document.decode(), all_errors=True)
    except (ValueError, RecursionError):
        return ["it is not JSON"]
    return [f"{error.data.json_path}: {error.data.message[:200]}" for error in errors or ()]


@functools.cache
def _validator() -> Any:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6)


def _bom(folder: Path, name: str, version: str, materials: Sequence[Material], epoch: int) -> Bom:
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentScope, ComponentType
    from cyclonedx.model.lifecycle import LifecyclePhase, PredefinedLifecycle
    from cyclonedx.model.tool import ToolRepository
    from packageurl import PackageURL

    described = Component(
        name=name, version=version, type=ComponentType.LIBRARY, bom_ref="wheel",
        purl=PackageURL("pypi", name=name, version=version), pedigree=_pedigree(materials),
    )  # fmt: skip
    tool = Component(
        name="voltforge", version=str(PIPELINE_VERSION), type=ComponentType.APPLICATION, bom_ref="tool:voltforge"
    )
    required = _requirements(folder)
    tools = [
        _component(material, ComponentScope.EXCLUDED)
        for material in materials
        if material.kind not in ("source", "patch")
    ]
    bom = Bom(
        metadata=BomMetaData(
            component=described,
            tools=ToolRepository(components=[tool]),
            lifecycles=[PredefinedLifecycle(LifecyclePhase.BUILD)],
            timestamp=datetime.fromtimestamp(epoch, timezone.utc),
        ),
        components=[*_binaries(folder), *required, *tools],
    )
    bom.register_dependency(described, required)
    return bom


def _binaries(folder: Path) -> list[Component]:
    """Return the native binaries of the wheel, by path and hash."""
    from cyclonedx.model.component import Component, ComponentScope, ComponentType

    return [
        Component(
            name=file, type=ComponentType.FILE, scope=ComponentScope.REQUIRED, bom_ref=f"file:{file}",
            hashes=_hashes([files.sha256(folder / file)]),
        )
        for file in wheelfile.members(folder)
        if elf.is_binary(folder / file)
    ]  # fmt: skip


def _requirements(folder: Path) -> list[Component]:
    """Return the projects of Requires-Dist, each with its lines; optional if only extras require it."""
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentScope, ComponentType
    from packageurl import PackageURL

    lines: dict[str, list[Requirement]] = {}
    for line in _requires_dist(folder):
        lines.setdefault(canonicalize_name(line.name), []).append(line)
    return [
        Component(
            name=name, type=ComponentType.LIBRARY, bom_ref=f"requirement:{name}", purl=PackageURL("pypi", name=name),
            scope=ComponentScope.OPTIONAL if all(map(_of_extra, group)) else ComponentScope.REQUIRED,
            properties=[Property(name="voltforge:requirement", value=str(line)) for line in group],
        )
        for name, group in lines.items()
    ]  # fmt: skip


def _requires_dist(folder: Path) -> list[Requirement]:
    metadata = wheelfile.dist_info(folder) / "METADATA"
    try:
        header = message_from_bytes(metadata.read_bytes(), policy=policy.compat32)
        return [Requirement(str(line)) for line in header.get_all("Requires-Dist", [])]
    except (OSError, InvalidRequirement) as error:
        raise SbomError(f"METADATA and its requirements cannot be read: {error}") from error


def _of_extra(requirement: Requirement) -> bool:
    return bool(requirement.marker and re.search(r"\bextra\b", str(requirement.marker)))


def _pedigree(materials: Iterable[Material]) -> Pedigree:
    """Return the pedigree: a wheel is a variant of its source, which the patches change."""
    from cyclonedx.model.component import Pedigree

    return Pedigree(
        ancestors=[_component(material, None) for material in materials if material.kind == "source"],
        patches=[_patch(material) for material in materials if material.kind == "patch"],
    )


def _patch(material: Material) -> Patch:
    """Return a patch by its name, followed by its hash as on package indexes: CycloneDX has no field for it."""
    from cyclonedx.model import XsUri
    from cyclonedx.model.component import Diff, Patch, PatchClassification

    hashes = "&".join(f"sha256={digest}" for digest in material.sha256)
    url = f"{quote(material.name)}#{hashes}" if hashes else quote(material.name)
    return Patch(type=PatchClassification.UNOFFICIAL, diff=Diff(url=XsUri(url)))


def _component(material: Material, scope: ComponentScope | None) -> Component:
    from cyclonedx.model.component import Component
    from packageurl import PackageURL

    return Component(
        name=material.name, version=material.version or None, type=_type(material), scope=scope,
        bom_ref=f"{material.kind}:{files.digest(as_json(material))[:16]}",
        purl=PackageURL.from_string(material.uri) if material.uri.startswith("pkg:") else None,
        hashes=_hashes(material.sha256) if len(material.sha256) == 1 or not material.uri else [],
        external_references=_references(material),
    )  # fmt: skip


def _type(material: Material) -> ComponentType:
    from cyclonedx.model.component import ComponentType

    types = {"package": ComponentType.LIBRARY, "compiler": ComponentType.APPLICATION}
    return types.get(material.kind, ComponentType.LIBRARY if material.uri.startswith("pkg:") else ComponentType.FILE)


def _references(material: Material) -> list[ExternalReference]:
    """Return the places of a material: its upstream address, or the files that a lock permits for a package."""
    from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri

    if not material.uri or (material.uri.startswith("pkg:") and len(material.sha256) < 2):
        return []  # a purl and one hash are sufficient
    url, hashes = XsUri(material.uri), _hashes(material.sha256)
    return [ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=url, hashes=hashes)]


def _hashes(values: Iterable[str]) -> list[HashType]:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=value) for value in values]


def inputs() -> dict[str, str]:
    """Return what decides the bytes of a wheel besides its content: the compression and the SBOM's writer."""
    writer = f"cyclonedx-python-lib {metadata.version('cyclonedx-python-lib')}"
    return {"compression": wheelfile.DEFLATE, "sbom": writer}


def embed(folder: Path, project: str, materials: Sequence[Material], epoch: int) -> None:
    """Write the SBOM of an unpacked wheel into its ``.dist-info/sboms`` (PEP 770)."""
    info = wheelfile.dist_info(folder)
    version = info.name.removesuffix(".dist-info").rpartition("-")[2]
    document = describe(folder, name=project, version=version, materials=materials, epoch=epoch)
    files.write(info / "sboms" / f"{project}.cdx.json", document)
