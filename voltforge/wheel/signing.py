"""Sign and verify statements about wheels.

Envelopes are DSSE v1 (secure-systems-lab/dsse) as in-toto uses it, signatures are Ed25519 (RFC 8032), and keys are PEM
files: PKCS#8 for the private key, SubjectPublicKeyInfo for public ones, as ``openssl pkey`` reads and writes both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voltforge.errors import VoltforgeError
from voltforge.system import files

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope

# cryptography and securesystemslib take a tenth of a second to import, so each function imports what it needs.

PAYLOAD_TYPE = "application/vnd.in-toto+json"
"""The type of the payload in an envelope: an in-toto statement, as JSON."""

_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----\n.*?(?:-----END \1-----|(?=-----BEGIN)|\Z)", re.DOTALL)
"""A PEM block (RFC 7468), up to the next one if it has no end."""
_KEYID = re.compile(r"[0-9a-f]{64}")


class SignatureError(VoltforgeError):
    """A key cannot be used, or no trusted key has signed an envelope."""


@dataclass(frozen=True)
class Signer:
    """A private key, for signing."""

    keyid: str
    """The key id in envelopes: a hexadecimal SHA-256 of the public key, as in securesystemslib and in-toto."""
    raw: bytes
    """The public key, 32 bytes."""
    secret: bytes = field(repr=False)
    """The private key, 32 bytes."""

    @classmethod
    def load(cls, path: Path) -> Signer:
        """Load the private key from a PEM file (PKCS#8, without a password).

        Raises:
            SignatureError: it cannot be read, is not an Ed25519 key, or can be read by others.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            with path.open("rb") as file:
                mode, pem = os.fstat(file.fileno()).st_mode, file.read()
        except OSError as error:
            raise SignatureError(f"the key {path} cannot be read: {error.strerror}") from error
        if mode & 0o077:
            raise SignatureError(f"the key {path} is accessible to other users", hint=f"chmod 600 {path}")
        try:
            return cls._of(load_pem_private_key(pem, None))
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: the key has a password
            raise SignatureError(
                f"{path} is not an Ed25519 key in PEM without a password", hint="openssl genpkey -algorithm ed25519"
            ) from error

    @classmethod
    def _of(cls, private: Any) -> Signer:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        if not isinstance(private, Ed25519PrivateKey):
            raise ValueError("another kind of key")
        raw = private.public_key().public_bytes_raw()
        return cls(_keyid(raw), raw, private.private_bytes_raw())

    @property
    def public(self) -> str:
        """Return the public key as a PEM block, for the file of trusted keys."""
        return _pem(self.raw)


@dataclass(frozen=True)
class Trust:
    """The trusted public keys; without any, no signature counts."""

    keys: Mapping[str, bytes] = field(default_factory=dict)
    """Public keys of 32 bytes by their key id."""

    @classmethod
    def load(cls, path: Path) -> Trust:
        """Load the public keys from a text file, as PEM blocks; text between them is comment.

        Raises:
            SignatureError: it cannot be read, holds no key, or a block is not an Ed25519 public key.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise SignatureError(f"the trusted keys {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise SignatureError(f"the trusted keys {path} are not UTF-8 text") from error
        raws = []
        for number, block in enumerate(_BLOCK.finditer(text), 1):
            try:
                raws.append(_raw_public_key(block[0]))
            except ValueError as error:
                line = text.count("\n", 0, block.start()) + 1
                raise SignatureError(
                    f"block {number} of {path}, {block[1].lower()} in line {line}, is not an Ed25519 public key",
                    hint="openssl pkey -pubin -text shows what it is",
                ) from error
        if not raws:  # A file of another format must not silently mean that no key is trusted.
            raise SignatureError(f"{path} holds no public key in PEM", hint="add one, or remove the file")
        return cls({_keyid(raw): raw for raw in raws})

    @classmethod
    def of(cls, *signers: Signer) -> Trust:
        """Trust in the keys of these signers."""
        return cls({signer.keyid: signer.raw for signer in signers})

    def __or__(self, other: Trust) -> Trust:
        return Trust({**self.keys, **other.keys})

    def __bool__(self) -> bool:
        return bool(self.keys)


def make_key(path: Path) -> Signer:
    """Make a private key at ``path``, readable by its owner only, written completely or not at all.

    Raises:
        SignatureError: the file exists, which is never replaced, or it cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    if os.path.lexists(path):
        raise SignatureError(f"{path} exists already, and a key is never replaced", hint="move it away")
    private = Ed25519PrivateKey.generate()
    try:
        with files.replacing(path, 0o600) as file:
            file.write(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    except OSError as error:
        raise SignatureError(f"the key {path} cannot be written: {error.strerror}") from error
    return Signer._of(private)


def make_envelope(payload: bytes, signer: Signer | None) -> bytes:
    """Return an envelope around ``payload``, one line of JSON; without a signer it has no signature.

    Equal payloads and keys give equal bytes: Ed25519 uses no random number.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not in the module's __all__

    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    if signer:
        envelope.sign(CryptoSigner(Ed25519PrivateKey.from_private_bytes(signer.secret)))
    return _serialise(envelope)


def unverified_payload(envelope: bytes) -> bytes:
    """Return the payload of an envelope without checking signatures.

    Raises:
        SignatureError: the envelope is malformed.
    """
    return bytes(_parse(envelope).payload)


def verified_payload(envelope: bytes, trust: Trust) -> bytes:
    """Return the payload of an envelope that at least one trusted key has signed.

    Raises:
        SignatureError: it is malformed or not signed, or no trusted key has signed this payload.
    """
    parsed = _parse(envelope)
    if not parsed.signatures:
        raise SignatureError(
            "the statement is not signed", hint="set VOLTFORGE_KEY where the wheel is built, so that it is signed"
        )
    known = [keyid for keyid in parsed.signatures if keyid in trust.keys]
    if not known:
        raise SignatureError(
            f"the statement is signed by the unknown key {', '.join(parsed.signatures)}",
            hint="add the public key to the file of VOLTFORGE_TRUSTED if you trust its owner",
        )
    if not any(_is_valid(parsed, trust.keys[keyid]) for keyid in known):
        raise SignatureError(f"the signature of the statement by the key {', '.join(known)} is not valid")
    return bytes(parsed.payload)


def default_key(environ: Mapping[str, str]) -> Path:
    """Return the path of the private key if VOLTFORGE_KEY is not set."""
    return _settings_folder(environ) / "key.pem"


def default_trusted(environ: Mapping[str, str]) -> Path:
    """Return the path of the trusted public keys if VOLTFORGE_TRUSTED is not set."""
    return _settings_folder(environ) / "trusted.pem"


def configured_keys(environ: Mapping[str, str]) -> tuple[Signer | None, Trust]:
    """Return the user's own key, if any, and the trusted keys: those of the file and the user's own.

    A file that VOLTFORGE_KEY or VOLTFORGE_TRUSTED names must exist; the defaults need not.

    Raises:
        SignatureError: a file cannot be used.
    """
    key, trusted = environ.get("VOLTFORGE_KEY"), environ.get("VOLTFORGE_TRUSTED")
    key_path, trusted_path = Path(key or default_key(environ)), Path(trusted or default_trusted(environ))
    signer = Signer.load(key_path) if key or key_path.exists() else None
    trust = Trust.load(trusted_path) if trusted or trusted_path.exists() else Trust()
    return signer, trust | Trust.of(*([signer] if signer else []))


def _settings_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of the user's settings (XDG Base Directory Specification, which ignores relative paths)."""
    configured = Path(environ.get("XDG_CONFIG_HOME", ""))
    home = Path(environ.get("HOME") or os.path.expanduser("~"))  # noqa: PTH111 - Path.home() raises where none is
    return (configured if configured.is_absolute() else home / ".config") / "voltforge"


def _parse(line: bytes) -> Envelope:
    """Parse an envelope from a line of JSON in its only valid form: no byte can change unnoticed."""
    from securesystemslib.dsse import Envelope

    try:
        value = json.loads(line)
        if not _well_formed(value):
            raise ValueError("it does not have the fields of an envelope")
        parsed = Envelope.from_dict(value)
        same = _serialise(parsed) == line
    except (ValueError, RecursionError) as error:
        raise SignatureError("it is not a DSSE envelope of an in-toto statement") from error
    if not same:  # base64 and JSON allow several forms of the same value
        raise SignatureError("it is a DSSE envelope, but not in the form that voltforge writes")
    return parsed


def _well_formed(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"payload", "payloadType", "signatures"}:
        return False
    signatures = value["signatures"]
    return (
        isinstance(value["payload"], str)
        and value["payloadType"] == PAYLOAD_TYPE
        and isinstance(signatures, list)
        and all(
            isinstance(signature, dict)
            and signature.keys() == {"keyid", "sig"}
            and all(isinstance(part, str) for part in signature.values())
            and _KEYID.fullmatch(signature["keyid"])
            for signature in signatures
        )
    )


def _serialise(envelope: Envelope) -> bytes:
    return json.dumps(envelope.to_dict(), sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _is_valid(envelope: Envelope, raw: bytes) -> bool:
    from securesystemslib.exceptions import VerificationError

    try:
        # One key at a time: Envelope.verify stops at the first signature that it cannot parse.
        envelope.verify([_public_key(raw)], 1)
    except VerificationError:
        return False
    return True


def _public_key(raw: bytes) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]  # not in the module's __all__

    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(raw))


def _keyid(raw: bytes) -> str:
    return str(_public_key(raw).keyid)


def _pem(raw: bytes) -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = Ed25519PublicKey.from_public_bytes(raw)
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _raw_public_key(pem: str) -> bytes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        public = load_pem_public_key(pem.encode())
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
    if not isinstance(public, Ed25519PublicKey):
        raise ValueError("another kind of key")
    return public.public_bytes_raw()
