"""`musplit doctor --identity`: dates and files of an identity folder."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edge_client.doctor.certificates import check_certificates
from wire_protocol.tls import TlsFiles

NOW = datetime(2030, 1, 1, tzinfo=UTC)
YEARS = timedelta(days=3650)


def certificate(name, key, signer, begins, ends):
    """A certificate for `key`, signed by `signer` of the authority "lab"."""

    def named(common_name):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])

    made = (
        x509.CertificateBuilder().subject_name(named(name)).issuer_name(named("lab"))
        .public_key(key.public_key()).serial_number(7)
        .not_valid_before(begins).not_valid_after(ends).sign(signer, hashes.SHA256())
    )  # fmt: skip
    return made.public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def folder(tmp_path):
    """Write an identity folder whose device certificate has these dates."""

    def _write(begins, ends):
        files = TlsFiles.in_folder(tmp_path)
        ca, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        files.ca.write_bytes(certificate("lab", ca, ca, NOW - YEARS, NOW + YEARS))
        files.certificate.write_bytes(certificate("pi-1", key, ca, begins, ends))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )  # fmt: skip
        files.key.chmod(0o600)
        return files

    return _write


def levels(files):
    return {finding.check: finding.level for finding in check_certificates(files, NOW)}


@pytest.mark.parametrize(
    ("begins", "ends", "level"),
    [
        (-YEARS, YEARS, "ok"),
        (-YEARS, timedelta(days=5), "warning"),
        (-YEARS, -timedelta(days=1), "error"),
        (timedelta(hours=1), YEARS, "error"),
    ],
)
def test_dates_of_the_certificate(folder, begins, ends, level):
    assert levels(folder(NOW + begins, NOW + ends)) == {
        "identity": "ok", "certificate": level, "ca-certificate": "ok",
    }  # fmt: skip


def test_a_key_that_others_can_read_or_that_is_missing_is_an_error(folder):
    files = folder(NOW - YEARS, NOW + YEARS)
    files.key.chmod(0o644)
    (finding,) = check_certificates(files, NOW)
    assert (finding.check, finding.level) == ("identity", "error")
    assert finding.remedy.startswith("chmod 600")
    files.key.unlink()
    assert levels(files) == {"identity": "error"}


def test_a_certificate_of_another_ca_is_an_error_before_the_broker_says_so(folder):
    files = folder(NOW - YEARS, NOW + YEARS)
    other = ec.generate_private_key(ec.SECP256R1())
    files.ca.write_bytes(certificate("lab", other, other, NOW - YEARS, NOW + YEARS))
    (finding,) = check_certificates(files, NOW)
    assert (finding.check, finding.level) == ("identity", "error")
    assert "is not from the CA" in finding.what


def test_a_key_with_a_passphrase_is_an_error_and_nobody_is_asked_for_it(folder):
    files = folder(NOW - YEARS, NOW + YEARS)
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )  # fmt: skip
    assert levels(files) == {"identity": "error"}
