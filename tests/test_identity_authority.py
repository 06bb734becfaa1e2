"""The authority: tokens, certificates, revocation, and what it keeps."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from identity_support import Lab

from identity.authority import Authority
from identity.broker import write_broker_folder
from identity.certificates import new_key, request
from identity.errors import AuthorityError, EnrolmentError, UntrustedError
from identity.files import write_private
from identity.signatures import check_bundle, sign_bundle
from musplit.cli import main
from wire_protocol.errors import IdentityError, InputError

DIGEST = "0123456789abcdef" * 4


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path, 1_800_000_000.5)


def refused(lab, token, *, name="pi-1", after_s=1.0, wanted=b""):
    with pytest.raises(EnrolmentError) as caught:
        lab.authority.redeem(token, wanted or request(name, new_key()), lab.now_s + after_s)
    return str(caught.value)


def test_a_token_gives_one_certificate_of_its_name_for_clients_alone(lab):
    files = lab.enrol("pi-1")
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    assert certificate.subject.rfc4514_string() == "CN=pi-1"
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [oid._name for oid in usage] == ["clientAuth"]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(lab.ca.read_bytes()))
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 366


def test_a_replayed_token_is_refused_and_says_what_to_do(lab):
    token = lab.authority.new_token("pi-1", 60, lab.now_s)
    lab.authority.redeem(token, request("pi-1", new_key()), lab.now_s + 1)
    assert "used already" in (why := refused(lab, token))
    assert "musplit ca revoke pi-1" in why


def test_the_same_key_gets_the_same_certificate_when_the_answer_was_lost(lab):
    token = lab.authority.new_token("pi-1", 60, lab.now_s)
    wanted = request("pi-1", new_key())
    first = lab.authority.redeem(token, wanted, lab.now_s + 1)
    assert lab.authority.redeem(token, wanted, lab.now_s + 9) == first
    lab.authority.revoke("pi-1", lab.now_s + 10)
    assert "void" in refused(lab, token, after_s=11, wanted=wanted)


def test_tokens_expire_and_are_void_after_a_newer_one(lab):
    token = lab.authority.new_token("pi-1", 60, lab.now_s)
    assert "expired at 2027-01-15 08:01 UTC" in refused(lab, token, after_s=60)
    newer = lab.authority.new_token("pi-1", 60, lab.now_s)
    assert "void" in refused(lab, token)
    lab.authority.redeem(newer, request("pi-1", new_key()), lab.now_s + 59)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda token: token[:-1], "unknown token"),
        (lambda token: "pi-2" + token[4:], "unknown token"),
        (lambda _: "", "unknown token"),
        (lambda _: "\udce4ö" * 9, "unknown token"),
    ],
)
def test_altered_tokens_are_unknown(lab, spoil, why):
    token = lab.authority.new_token("pi-1", 60, lab.now_s)
    text = spoil(token).encode("utf-8", "replace").decode()
    assert why in refused(lab, text)


def test_a_token_is_for_its_device_alone_and_a_refusal_leaves_it_valid(lab):
    token = lab.authority.new_token("pi-1", 60, lab.now_s)
    assert "for 'pi-1', not for 'pi-2'" in refused(lab, token, name="pi-2")
    assert "no signing request" in refused(lab, token, wanted=b"nonsense")
    wanted = request("pi-1", new_key())
    broken = wanted.replace(wanted[60:64], b"AAAA")
    assert "signing request" in refused(lab, token, wanted=broken)
    assert lab.authority.redeem(token, wanted, lab.now_s)


def test_a_new_certificate_revokes_the_one_before(lab):
    lab.enrol("pi-1")
    lab.enrol("pi-1")
    states = [i.revoked_unix_s for i in lab.authority.ledger().certificates if i.name == "pi-1"]
    assert states == [int(lab.now_s), None]
    assert lab.authority.ledger().muted(lab.now_s) == []
    lab.authority.revoke("pi-1", lab.now_s)
    assert lab.authority.ledger().muted(lab.now_s) == ["pi-1"]
    with pytest.raises(AuthorityError, match="no valid certificate"):
        lab.authority.revoke("pi-1", lab.now_s)


def test_the_revocation_list_holds_what_is_revoked_and_outlives_the_authority(lab):
    lab.enrol("pi-1")
    lab.authority.revoke("pi-1", lab.now_s)
    crl = x509.load_pem_x509_crl(lab.authority.revocation_list(lab.now_s))
    ca = x509.load_pem_x509_certificate(lab.ca.read_bytes())
    serials = {int(i.serial, 16) for i in lab.authority.ledger().certificates if i.revoked_unix_s}
    assert {entry.serial_number for entry in crl} == serials != set()
    assert crl.next_update_utc == ca.not_valid_after_utc
    assert crl.is_signature_valid(ca.public_key())


def test_secrets_are_for_their_owner_alone_and_tokens_are_kept_by_digest(lab):
    token = lab.authority.new_token("pi-1", 60, lab.now_s)
    folder = lab.folder / "ca"
    for path in (*folder.rglob("*.key"), folder / "ledger.json", folder / "audit.jsonl"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    secret = token.partition(":")[2]
    assert not [p for p in folder.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]
    events = [
        json.loads(line)["event"] for line in (folder / "audit.jsonl").read_text().splitlines()
    ]
    assert events == ["init", "token"]


def test_an_authority_is_not_made_twice_and_says_when_it_is_missing(lab, tmp_path):
    with pytest.raises(AuthorityError, match="already"):
        Authority.init(lab.folder / "ca", ["lab"], [], lab.now_s)
    with pytest.raises(AuthorityError, match="musplit ca init"):
        Authority(tmp_path / "none").ledger()
    with pytest.raises(IdentityError, match="at most 56 characters"):
        lab.authority.add_fleet("f" * 57, lab.now_s)
    with pytest.raises(InputError, match="device id"):
        lab.authority.new_token("_server.lab", 60, lab.now_s)


@pytest.mark.parametrize("host", ["", "a b", "b\u00fccher", "x\ny", "-x", "h:1"])
def test_hosts_that_no_certificate_can_name_are_refused_before_anything_is_made(
    lab, tmp_path, host
):
    with pytest.raises(AuthorityError, match=r"--host .*write an address"):
        Authority.init(tmp_path / "new", ["lab"], [host], lab.now_s)
    assert not (tmp_path / "new").exists()
    with pytest.raises(AuthorityError, match="--host"):
        lab.authority.set_hosts(["192.168.1.10", host], lab.now_s)


@pytest.mark.parametrize("listen", ["0.0.0.0\nallow_anonymous true", "a b:1", "a..b", "h:99999"])
def test_an_address_brings_no_line_of_its_own_into_the_configuration(lab, tmp_path, listen):
    done = CliRunner().invoke(
        main, ["ca", "broker-config", "--dir", str(lab.folder / "ca"), "--out",
               str(tmp_path / "broker"), "--listen", listen],
    )  # fmt: skip
    assert done.exit_code == 3
    assert done.stderr.count("\n") == 1
    assert "write HOST or HOST:PORT" in done.stderr
    assert not (tmp_path / "broker").exists()


def test_a_group_readable_key_is_refused_with_the_remedy(lab):
    key = lab.folder / "ca" / "ca.key"
    key.chmod(0o640)
    with pytest.raises(IdentityError, match=f"chmod 600 {key}"):
        lab.enrol("pi-1")
    signer = lab.server("lab").folder / "signer.key"
    signer.chmod(0o604)
    with pytest.raises(IdentityError, match="others can read"):
        sign_bundle(signer.parent, DIGEST)


def test_openssl_accepts_the_chain(lab):
    files = lab.enrol("pi-1")
    for path, purpose in (
        (files.certificate, "sslclient"),
        (lab.ca.parent / "broker.pem", "sslserver"),
    ):
        done = subprocess.run(
            ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-attime",
             str(int(lab.now_s)), "-CAfile", str(lab.ca), str(path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_signatures_hold_for_one_bundle_and_one_lab(lab, tmp_path):
    device, server = lab.enrol("pi-1").folder, lab.server("lab").folder
    signature = sign_bundle(server, DIGEST)
    assert len(signature) == 64
    check_bundle(device, DIGEST, signature)
    other = Lab(tmp_path / "b", lab.now_s)
    for digest, given, why in (
        (DIGEST, b"", "not signed"),
        (DIGEST[::-1], signature, "altered"),
        (DIGEST, signature[:-1], "altered"),
        (DIGEST, sign_bundle(other.server("lab").folder, DIGEST), "another key"),
    ):
        with pytest.raises(UntrustedError, match=why):
            check_bundle(device, digest, given)
    (device / "signer.pub").unlink()
    with pytest.raises(IdentityError, match=r"signer\.pub"):
        check_bundle(device, DIGEST, signature)


def test_signatures_are_plain_ed25519_over_a_prefix_and_the_digest(lab, tmp_path):
    """What another implementation has to do, done by openssl."""
    signature, message = tmp_path / "sig", tmp_path / "message"
    signature.write_bytes(sign_bundle(lab.server("lab").folder, DIGEST))
    message.write_bytes(b"musplit bundle 1\0" + bytes.fromhex(DIGEST))
    done = subprocess.run(
        ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey",
         str(lab.folder / "ca" / "signer.pub"), "-sigfile", str(signature), "-in", str(message)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Signature Verified Successfully" in done.stdout, done.stderr


def test_the_signature_in_the_protocols_document(tmp_path):
    """Golden bytes: the key is that of RFC 8032, 7.1, test 1."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "wire-protocol.md").read_text()
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    key = Ed25519PrivateKey.from_private_bytes(seed)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_private(tmp_path / "signer.key", pem)
    signature = sign_bundle(tmp_path, bytes(range(32)).hex()).hex()
    assert f"```\n{signature[:64]}\n{signature[64:]}\n```" in text


def test_the_ledger_is_whole_or_the_old_one(lab, monkeypatch):
    before = lab.authority.ledger()

    def fails(_self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(IdentityError, match="No space left"):
        lab.authority.new_token("pi-1", 60, lab.now_s)
    assert lab.authority.ledger() == before


@pytest.mark.parametrize(
    ("field", "value"), [("serial", "zz"), ("serial", ""), ("expires_unix_s", 10**18)]
)
def test_a_ledger_changed_by_hand_is_damaged_and_the_field_is_named(lab, field, value):
    path = lab.authority.folder / "ledger.json"
    ledger = json.loads(path.read_text())
    ledger["certificates"][0][field] = value
    path.write_text(json.dumps(ledger))
    with pytest.raises(AuthorityError, match=rf"ledger\.json: damaged .*{field}.*from a copy"):
        lab.authority.ledger()


def test_a_token_does_not_overwrite_a_file_that_is_not_its_own(lab, tmp_path):
    def enroll(device):
        folder, out = str(lab.authority.folder), str(tmp_path / "a.token")
        return CliRunner().invoke(main, ["ca", "enroll", device, "--dir", folder, "--out", out])

    assert [enroll("pi-1").exit_code, enroll("pi-1").exit_code] == [0, 0]
    refused = enroll("pi-2")
    assert refused.exit_code == 3
    assert "a.token: exists, and is no token of pi-2; give another file" in refused.stderr
    assert (tmp_path / "a.token").read_text().startswith("pi-1:")


def test_a_broker_is_not_given_the_authoritys_folder(lab):
    before = sorted(path.name for path in lab.authority.folder.iterdir())
    with pytest.raises(IdentityError, match="give another --out"):
        write_broker_folder(lab.authority, lab.authority.folder, "127.0.0.1", 8883, lab.now_s)
    assert sorted(path.name for path in lab.authority.folder.iterdir()) == before
