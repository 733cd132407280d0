"""Tests of keys, trust and envelopes: signatures verify, and an envelope with one changed bit is refused."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner

from tests.support.rights import ordinary_user
from voltforge.wheel import signing
from voltforge.wheel.signing import SignatureError, Signer, Trust

STATEMENT = b'{"_type":"https://in-toto.io/Statement/v1"}'
ROW = "corrupt inputs refused: provenance and signatures"


def private_file(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def pem(private, encryption=None) -> bytes:
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def refused(envelope: bytes, trust: Trust) -> bool:
    try:
        signing.verified_payload(envelope, trust)
    except SignatureError:
        return True
    return False


# --- the key ---


def test_new_key_is_readable_by_its_owner_only_and_loads(tmp_path):
    path = tmp_path / "new folder" / "key.pem"
    key = signing.make_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [*path.parent.iterdir()] == [path]
    assert Signer.load(path) == key


def test_openssl_reads_the_same_public_key(tmp_path):
    key = signing.make_key(tmp_path / "key.pem")
    printed = subprocess.run(
        ["openssl", "pkey", "-in", tmp_path / "key.pem", "-pubout"], capture_output=True, text=True, check=True
    )
    assert printed.stdout == key.public


def test_key_made_by_openssl_signs_and_verifies(tmp_path):
    path = tmp_path / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", path], check=True)
    path.chmod(0o600)
    assert (
        signing.verified_payload(signing.make_envelope(STATEMENT, Signer.load(path)), Trust.of(Signer.load(path)))
        == STATEMENT
    )


def test_new_keys_differ(signer, stranger):
    assert signer.keyid != stranger.keyid
    assert signer.public != stranger.public


def test_key_id_matches_securesystemslib(signer):
    private = Ed25519PrivateKey.from_private_bytes(signer.secret)
    assert signer.keyid == CryptoSigner(private).public_key.keyid


@pytest.mark.parametrize("kind", ["a key", "a file", "a broken link"])
def test_existing_file_is_not_replaced_by_a_new_key(tmp_path, kind):
    path = tmp_path / "key.pem"
    if kind == "a key":
        signing.make_key(path)
    elif kind == "a file":
        path.write_bytes(b"precious")
    else:
        path.symlink_to("nowhere")
    before = path.lstat()
    with pytest.raises(SignatureError, match="already"):
        signing.make_key(path)
    assert path.lstat() == before


def test_unwritable_key_is_reported(tmp_path):
    tmp_path.chmod(0o555)
    with ordinary_user(), pytest.raises(SignatureError, match="cannot be written: Permission denied"):
        signing.make_key(tmp_path / "key.pem")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610, 0o601, 0o644])
def test_key_accessible_to_other_users_is_refused(tmp_path, mode):
    signing.make_key(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(mode)
    with pytest.raises(SignatureError) as refusal:
        Signer.load(tmp_path / "key.pem")
    assert refusal.value.hint == f"chmod 600 {tmp_path / 'key.pem'}"


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_key_readable_by_its_owner_only_is_loaded(tmp_path, mode):
    key = signing.make_key(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(mode)
    assert Signer.load(tmp_path / "key.pem") == key


OTHER_KEYS = {
    "empty": b"",
    "text": b"my key is in the other drawer\n",
    "RSA": pem(rsa.generate_private_key(65537, 2048)),
    "P-256": pem(ec.generate_private_key(ec.SECP256R1())),
    "with a password": pem(Ed25519PrivateKey.generate(), BestAvailableEncryption(b"secret")),
    "a public one": Ed25519PrivateKey.generate().public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    ),
    "cut off": pem(Ed25519PrivateKey.generate())[:60],
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KEYS)
def test_key_that_is_not_ed25519_is_refused(tmp_path, kind):
    with pytest.raises(SignatureError, match="not an Ed25519 key"):
        Signer.load(private_file(tmp_path / "key.pem", OTHER_KEYS[kind]))


@pytest.mark.parametrize(("name", "why"), [("nowhere", "No such file"), ("", "Is a directory")])
def test_unreadable_key_is_reported(tmp_path, name, why):
    with pytest.raises(SignatureError, match=why):
        Signer.load(tmp_path / name)


def test_repr_of_a_signer_hides_the_private_key(signer):
    assert repr(signer.secret) not in repr(signer)
    assert signer.secret.hex() not in repr(signer)


# --- trusted keys ---


def test_trusted_keys_are_read_between_comments(tmp_path, signer, stranger):
    path = tmp_path / "trusted.pem"
    path.write_text(f"the build machine, since May\n{signer.public}\n# a friend: -----\n{stranger.public}the end")
    assert Trust.load(path) == Trust.of(signer, stranger)


def test_trust_is_combined_with_or(signer, stranger):
    assert Trust.of(signer) | Trust.of(stranger) == Trust.of(signer, stranger)
    assert Trust() | Trust.of(signer) == Trust.of(signer)


def test_empty_trust_is_falsy(signer):
    assert not Trust()
    assert Trust.of(signer)


@pytest.mark.parametrize("wrong", ["a private key", "no end", "another kind", "not base64"])
def test_block_that_is_not_a_public_key_is_reported_with_its_line(tmp_path, signer, stranger, wrong):
    block = {
        "a private key": pem(Ed25519PrivateKey.generate()).decode(),
        "no end": stranger.public.replace("-----END PUBLIC KEY-----", ""),
        "another kind": ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        ).decode(),
        "not base64": stranger.public.replace("MC", "!!"),
    }[wrong]  # fmt: skip
    path = tmp_path / "trusted.pem"
    path.write_text(f"one\n{signer.public}two\n{block}three\n{stranger.public}")
    with pytest.raises(SignatureError, match=r"block 2 of .*trusted\.pem, (public|private) key in line 6,"):
        Trust.load(path)


@pytest.mark.parametrize("content", [b"", b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 me\n", b"# nobody yet\n"])
def test_trusted_file_without_a_key_is_refused(tmp_path, content):
    (tmp_path / "trusted.pem").write_bytes(content)
    with pytest.raises(SignatureError, match="holds no public key"):
        Trust.load(tmp_path / "trusted.pem")


def test_unreadable_trusted_file_is_reported(tmp_path):
    with pytest.raises(SignatureError, match="No such file"):
        Trust.load(tmp_path / "nowhere")
    (tmp_path / "trusted.pem").write_bytes(b"\xff\xfe")
    with pytest.raises(SignatureError, match="not UTF-8"):
        Trust.load(tmp_path / "trusted.pem")


# --- envelopes ---


@settings(deadline=None)
@given(st.binary())
def test_payload_of_an_envelope_is_read_back(signer, payload):
    envelope = signing.make_envelope(payload, signer)
    assert signing.unverified_payload(envelope) == signing.verified_payload(envelope, Trust.of(signer)) == payload
    assert signing.unverified_payload(signing.make_envelope(payload, None)) == payload


def test_envelope_is_one_line_and_reproducible(signer):
    envelope = signing.make_envelope(STATEMENT, signer)
    assert envelope.endswith(b"\n")
    assert envelope.count(b"\n") == 1
    assert signing.make_envelope(STATEMENT, signer) == envelope


def test_signature_is_over_the_encoding_of_the_dsse_specification(signer):
    """Check the signature over ``DSSEv1 LEN(type) type LEN(body) body`` (DSSE v1.0) without securesystemslib."""
    envelope = json.loads(signing.make_envelope(STATEMENT, signer))
    signed = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(STATEMENT), STATEMENT)
    [signature] = envelope["signatures"]
    Ed25519PublicKey.from_public_bytes(signer.raw).verify(base64.b64decode(signature["sig"]), signed)
    assert signature["keyid"] == signer.keyid
    assert base64.b64decode(envelope["payload"]) == STATEMENT


def test_unsigned_envelope_is_refused(signer):
    with pytest.raises(SignatureError, match="not signed"):
        signing.verified_payload(signing.make_envelope(STATEMENT, None), Trust.of(signer))


def test_unknown_key_is_refused_and_reported(signer, stranger):
    with pytest.raises(SignatureError, match=f"unknown key {stranger.keyid}"):
        signing.verified_payload(signing.make_envelope(STATEMENT, stranger), Trust.of(signer))
    with pytest.raises(SignatureError, match="unknown key"):
        signing.verified_payload(signing.make_envelope(STATEMENT, stranger), Trust())


def test_signature_of_another_statement_is_refused(signer):
    envelope, other = (json.loads(signing.make_envelope(text, signer)) for text in (STATEMENT, b"{}"))
    forged = {**envelope, "signatures": other["signatures"]}
    with pytest.raises(SignatureError, match=f"by the key {signer.keyid} is not valid"):
        signing.verified_payload(line(forged), Trust.of(signer))


def test_signature_under_a_foreign_key_id_is_refused(signer, stranger):
    forged = json.loads(signing.make_envelope(STATEMENT, stranger))
    forged["signatures"][0]["keyid"] = signer.keyid
    with pytest.raises(SignatureError, match="not valid"):
        signing.verified_payload(line(forged), Trust.of(signer))


@pytest.mark.parametrize("first", ["unknown", "wrong", "too short"])
def test_one_valid_signature_of_several_is_sufficient(signer, stranger, first):
    both = Envelope(STATEMENT, signing.PAYLOAD_TYPE, {})
    for key in (stranger, signer):
        both.sign(CryptoSigner(Ed25519PrivateKey.from_private_bytes(key.secret)))
    value = both.to_dict()
    if first != "unknown":
        value["signatures"][0]["sig"] = base64.b64encode(bytes(64 if first == "wrong" else 5)).decode()
    trust = Trust.of(signer) if first == "unknown" else Trust.of(signer, stranger)
    assert signing.verified_payload(line(value), trust) == STATEMENT
    assert refused(line({**value, "signatures": value["signatures"][:1]}), trust)


def line(envelope: dict) -> bytes:
    return json.dumps(envelope, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_envelope_with_any_flipped_bit_is_refused(signer, counted):
    envelope, trust = signing.make_envelope(STATEMENT, signer), Trust.of(signer)
    flipped = [
        envelope[:place] + bytes([envelope[place] ^ 1 << bit]) + envelope[place + 1 :]
        for place in range(len(envelope))
        for bit in range(8)
    ]
    assert [bad for bad in flipped if not refused(bad, trust)] == []
    counted(ROW, len(flipped))


def test_truncated_or_extended_envelope_is_refused(signer, counted):
    envelope, trust = signing.make_envelope(STATEMENT, signer), Trust.of(signer)
    changed = [envelope[:end] for end in range(len(envelope))]
    changed += [envelope + more for more in (b"\n", b" ", b"\0", b"{}", envelope)] + [b" " + envelope]
    assert [bad for bad in changed if not refused(bad, trust)] == []
    counted(ROW, len(changed))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.binary(max_size=3), st.integers(0, 3))
def test_envelope_with_edited_bytes_is_refused(signer, place, inserted, removed):
    envelope = signing.make_envelope(STATEMENT, signer)
    place %= len(envelope) + 1
    changed = envelope[:place] + inserted + envelope[place + removed :]
    assert changed == envelope or refused(changed, Trust.of(signer))


GOOD = {"payload": "e30=", "payloadType": signing.PAYLOAD_TYPE, "signatures": [{"keyid": "a" * 64, "sig": "AAAA"}]}
MALFORMED = [
    [], {}, None, 1, "text",
    {**GOOD, "more": 1},
    {**GOOD, "payload": None},
    {**GOOD, "payload": "e30"},
    {**GOOD, "payload": "e31="},  # base64 of the same bytes in a form that an encoder does not write
    {**GOOD, "payload": "€"},
    {**GOOD, "payload": "\ud800"},
    {**GOOD, "payloadType": "text/plain"},
    {**GOOD, "payloadType": None},
    {**GOOD, "signatures": None},
    {**GOOD, "signatures": {}},
    {**GOOD, "signatures": ["AAAA"]},
    {**GOOD, "signatures": [{}]},
    {**GOOD, "signatures": [{"sig": "AAAA"}]},
    {**GOOD, "signatures": [{"keyid": "a" * 64}]},
    {**GOOD, "signatures": [{"keyid": "a" * 64, "sig": "?"}]},
    {**GOOD, "signatures": [{"keyid": "a" * 64, "sig": 1}]},
    {**GOOD, "signatures": [{"keyid": "A" * 64, "sig": "AAAA"}]},
    {**GOOD, "signatures": [{"keyid": "\x1b[31m", "sig": "AAAA"}]},
    {**GOOD, "signatures": [{"keyid": "a" * 64, "sig": "AAAA", "cert": "x"}]},
    {**GOOD, "signatures": GOOD["signatures"] * 2},
]  # fmt: skip


def test_malformed_envelope_is_refused(counted):
    assert signing.unverified_payload(line(GOOD)) == b"{}"
    envelopes = [*map(line, MALFORMED), b"", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000]
    envelopes += [json.dumps(GOOD).encode(), json.dumps(GOOD, sort_keys=True, indent=1).encode() + b"\n"]
    envelopes += [line(GOOD).replace(b'{"payload":', b'{"payload":"e30=","payload":', 1)]
    for bad in envelopes:
        with pytest.raises(SignatureError, match="DSSE envelope"):
            signing.unverified_payload(bad)
    counted(ROW, len(envelopes))


# --- settings ---


@pytest.fixture
def home(tmp_path) -> Path:
    (tmp_path / ".config" / "voltforge").mkdir(parents=True)
    return tmp_path


def test_without_key_files_there_is_no_signer_and_no_trust(home):
    assert signing.configured_keys({"HOME": str(home)}) == (None, Trust())


def test_own_key_is_trusted(home):
    key = signing.make_key(home / ".config" / "voltforge" / "key.pem")
    assert signing.configured_keys({"HOME": str(home)}) == (key, Trust.of(key))


def test_keys_of_the_trusted_file_are_added_to_the_own_key(home, stranger):
    key = signing.make_key(home / ".config" / "voltforge" / "key.pem")
    (home / ".config" / "voltforge" / "trusted.pem").write_text(stranger.public)
    assert signing.configured_keys({"HOME": str(home)}) == (key, Trust.of(key, stranger))


def test_key_files_named_by_variables_replace_the_defaults(home, signer, stranger):
    signing.make_key(home / ".config" / "voltforge" / "key.pem")
    key = signing.make_key(home / "other.pem")
    (home / "friends.pem").write_text(stranger.public)
    named = {"VOLTFORGE_KEY": str(home / "other.pem"), "VOLTFORGE_TRUSTED": str(home / "friends.pem")}
    assert signing.configured_keys({"HOME": str(home), **named}) == (key, Trust.of(key, stranger))


@pytest.mark.parametrize("variable", ["VOLTFORGE_KEY", "VOLTFORGE_TRUSTED"])
def test_missing_key_file_named_by_a_variable_is_refused(home, variable):
    with pytest.raises(SignatureError, match="nowhere cannot be read: No such file"):
        signing.configured_keys({"HOME": str(home), variable: str(home / "nowhere")})
    assert signing.configured_keys({"HOME": str(home), variable: ""}) == (None, Trust())


def test_default_paths_follow_the_xdg_specification():
    places = (signing.default_key, signing.default_trusted)
    assert [str(place({"HOME": "/h"})) for place in places] == [
        "/h/.config/voltforge/key.pem", "/h/.config/voltforge/trusted.pem",
    ]  # fmt: skip
    assert str(signing.default_key({"HOME": "/h", "XDG_CONFIG_HOME": "/x"})) == "/x/voltforge/key.pem"
    assert str(signing.default_key({"HOME": "/h", "XDG_CONFIG_HOME": "x"})) == "/h/.config/voltforge/key.pem"


# --- imports ---


@pytest.mark.parametrize("module", ["wheel.signing", "sources.materials", "wheel.sbom", "wheel.provenance"])
def test_slow_libraries_are_not_imported_with_the_module(module):
    look = (
        f"import sys, voltforge.{module}\n"
        "slow = {'cryptography', 'securesystemslib', 'cyclonedx', 'in_toto_attestation', 'google', 'packageurl'}\n"
        "print(sorted(slow & {name.split('.')[0] for name in sys.modules}))"
    )
    printed = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert printed.stdout == "[]\n"
