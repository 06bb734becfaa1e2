"""Enrolment over HTTPS: the board's side against the service, in one process."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import threading
import time

import pytest
from identity_support import LOOPBACK, Lab

from identity import service as service_module
from identity.certificates import new_key, request
from identity.enrol import enrol
from identity.errors import EnrolmentError
from identity.exchange import MAX_BYTES
from identity.service import EnrolmentService, RefusalLimit
from wire_protocol.errors import IdentityError, InputError, TransportError
from wire_protocol.events import Address
from wire_protocol.tls import TlsFiles, trusting


class Site:
    """A lab whose enrolment service runs."""

    def __init__(self, folder):
        self.lab, self.said = Lab(folder), []
        self.now_s = self.lab.now_s
        self.service = EnrolmentService(
            self.lab.authority, Address(LOOPBACK, 0), self.said.append, lambda: self.now_s
        )
        self.port = self.service.server_address[1]
        self.url = f"https://{LOOPBACK}:{self.port}"
        self._thread = threading.Thread(target=self.service.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self):
        self.service.shutdown()
        self._thread.join()
        self.service.server_close()

    def token(self, name="pi-1", valid_s=600.0):
        return self.lab.authority.new_token(name, valid_s, self.now_s)

    def enrol(self, folder, token, *, ca=None, device_id="", now_s=None):
        now_s = self.now_s if now_s is None else now_s
        return enrol(self.url, ca or self.lab.ca, token, folder, device_id, now_s)

    def post(self, body: bytes, *, head: bytes = b"", path: bytes = b"/enroll") -> bytes:
        """A request as a stranger would write it."""
        raw = socket.create_connection((LOOPBACK, self.port), 10)
        with trusting(self.lab.ca).wrap_socket(raw, server_hostname=LOOPBACK) as stream:
            head = head or b"Content-Length: %d\r\n" % len(body)
            stream.sendall(b"POST %s HTTP/1.1\r\n%s\r\n%s" % (path, head, body))
            data = b""
            while piece := stream.recv(65536):
                data += piece
            return data


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path)
    yield site
    site.close()


def test_a_board_enrols_once_and_then_does_nothing(site, tmp_path):
    board = tmp_path / "board"
    done = site.enrol(board, site.token())
    assert (done.device_id, done.fresh) == ("pi-1", True)
    assert sorted(p.name for p in board.iterdir()) == [
        "ca.pem", "device.key", "device.pem", "signer.pub",
    ]  # fmt: skip
    TlsFiles.in_folder(board).context()
    before = {p: p.stat().st_mtime_ns for p in board.iterdir()}
    assert site.enrol(board, "") == done._replace(fresh=False)
    assert site.enrol(board, "pi-1:whatever", device_id="pi-1").fresh is False
    assert {p: p.stat().st_mtime_ns for p in board.iterdir()} == before


def test_an_interrupted_enrolment_goes_on_with_its_key(site, tmp_path):
    board, token = tmp_path / "board", site.token()
    site.enrol(board, token)
    key = (board / "device.key").read_bytes()
    (board / "device.pem").unlink()  # as if the answer had been lost
    assert site.enrol(board, token).fresh
    assert (board / "device.key").read_bytes() == key


def test_a_certificate_that_ends_soon_is_renewed(site, tmp_path):
    board = tmp_path / "board"
    site.enrol(board, site.token())
    site.now_s += 340 * 86400
    assert site.enrol(board, "").fresh is False
    assert site.enrol(board, site.token()).fresh


def test_refusals_name_their_reason_on_both_sides_and_no_secret(site, tmp_path):
    token, old = site.token(), site.token("pi-2", 1)
    site.enrol(tmp_path / "a", token)
    site.now_s += 2
    cases = [(token, "used already"), (old, "expired"), ("pi-1:abc", "unknown token")]
    for number, (given, why) in enumerate(cases):
        with pytest.raises(EnrolmentError, match=why):
            site.enrol(tmp_path / f"b{number}", given)
        assert why in site.said[-1]
    audit = (site.lab.folder / "ca" / "audit.jsonl").read_text()
    reasons = [json.loads(line).get("reason", "") for line in audit.splitlines()]
    assert [why for _, why in cases if any(why in reason for reason in reasons)] == [
        why for _, why in cases
    ]
    for secret in (token, old):
        assert secret.partition(":")[2] not in audit + "".join(site.said)


def test_a_service_of_another_lab_gets_no_token(site, tmp_path):
    other = Lab(tmp_path / "other")
    with pytest.raises(TransportError, match=r"not from the CA in ca\.pem"):
        site.enrol(tmp_path / "board", site.token(), ca=other.ca)
    assert not [line for line in site.said if "pi-1" in line]


def test_a_board_whose_clock_is_in_1970_says_so(site, tmp_path):
    with pytest.raises(TransportError, match=r"clock says 1970-01-01 00:00 UTC.*NTP"):
        site.enrol(tmp_path / "board", site.token(), now_s=5.0)


def test_the_wrong_board_is_told(site, tmp_path):
    token = site.token()
    with pytest.raises(IdentityError, match="the token is for device 'pi-1', not for 'pi-2'"):
        site.enrol(tmp_path / "board", token, device_id="pi-2")
    site.enrol(tmp_path / "board", token)
    with pytest.raises(IdentityError, match="identity of 'pi-1', not of 'pi-2'"):
        site.enrol(tmp_path / "board", "", device_id="pi-2")
    with pytest.raises(IdentityError, match="no token is given"):
        site.enrol(tmp_path / "empty", "")


@pytest.mark.parametrize("url", ["http://h", "https://", "https://u@h", "https://h:x", "h:8884"])
def test_urls_are_checked(tmp_path, site, url):
    with pytest.raises(InputError, match="--url"):
        enrol(url, site.lab.ca, site.token(), tmp_path / "b", "", site.now_s)


def test_nobody_there(tmp_path, site):
    url = f"https://{LOOPBACK}:9"
    for where in (url, "https://a..b"):
        with pytest.raises(TransportError, match="musplit ca serve"):
            enrol(where, site.lab.ca, site.token(), tmp_path / "b", "", site.now_s)


@pytest.mark.parametrize(
    ("body", "head", "path", "status"),
    [
        (b"{}", b"", b"/enroll", b"403"),
        (b"\xff" * 100, b"", b"/enroll", b"403"),
        (b"[" * 5000, b"", b"/enroll", b"403"),
        (b"", b"Content-Length: 99999999999\r\n", b"/enroll", b"403"),
        (b"", b"Content-Length: -1\r\n", b"/enroll", b"403"),
        (b"", b"Content-Length: 000000001999999999\r\n", b"/enroll", b"403"),
        (b"", b"Host: x\r\n", b"/enroll", b"403"),
        (b"{}", b"", b"/../ca.key", b"403"),
        (b"x" * (MAX_BYTES + 1), b"", b"/enroll", b"403"),
    ],
)
def test_strangers_requests_are_refused_small(site, body, head, path, status):
    try:
        answer = site.post(body, head=head, path=path)
    except ConnectionResetError:
        answer = b""
    if not answer and len(body) > MAX_BYTES:
        return  # what it did not read may reset the connection before the answer is read
    assert answer.split(b" ", 2)[1] == status
    assert len(answer) < 1000


def test_a_signing_request_of_an_unknown_curve_counts_as_refused(site):
    p256 = bytes.fromhex("06082a8648ce3d030107")
    der = ssl.PEM_cert_to_DER_cert(
        request("pi-1", new_key()).decode().replace("CERTIFICATE REQUEST", "CERTIFICATE")
    )
    odd = ssl.DER_cert_to_PEM_cert(der.replace(p256, p256[:-1] + b"\x7f"))
    odd = odd.replace("CERTIFICATE", "CERTIFICATE REQUEST")
    body = json.dumps({"token": site.token(), "request": odd}).encode()
    assert b"signing request" in site.post(body)
    assert "refused pi-1" in site.said[-1]


def test_a_signer_that_the_lab_gave_by_hand_is_not_replaced(site, tmp_path):
    board, token = tmp_path / "board", site.token()
    board.mkdir(mode=0o700)
    theirs = Lab(tmp_path / "other").ca.with_name("signer.pub").read_bytes()
    (board / "signer.pub").write_bytes(theirs)
    with pytest.raises(EnrolmentError, match=r"another than .*signer\.pub"):
        site.enrol(board, token)
    assert (board / "signer.pub").read_bytes() == theirs
    (board / "signer.pub").write_bytes(site.lab.ca.with_name("signer.pub").read_bytes())
    assert site.enrol(board, token).fresh


def test_a_full_disk_at_the_service_is_said_on_both_sides(site, tmp_path):
    (tmp_path / "ca" / "audit.jsonl").unlink()
    (tmp_path / "ca" / "audit.jsonl").mkdir()
    ledger = json.loads((tmp_path / "ca" / "ledger.json").read_text())
    token = "pi-1:spare"
    ledger["tokens"] = [{"sha256": hashlib.sha256(token.encode()).hexdigest(),
                         "device_id": "pi-1", "expires_unix_s": int(site.now_s) + 60}]  # fmt: skip
    (tmp_path / "ca" / "ledger.json").write_text(json.dumps(ledger))
    with pytest.raises(TransportError, match="see the service's log"):
        site.enrol(tmp_path / "board", token)
    assert "audit.jsonl: cannot be written" in site.said[-1]
    (tmp_path / "ca" / "audit.jsonl").rmdir()
    assert site.enrol(tmp_path / "board", token).fresh  # the same key: the same certificate


def test_other_methods_and_old_tls_are_refused(site):
    raw = socket.create_connection((LOOPBACK, site.port), 10)
    with trusting(site.lab.ca).wrap_socket(raw, server_hostname=LOOPBACK) as stream:
        stream.sendall(b"GET /ca.key HTTP/1.0\r\n\r\n")
        assert b"501" in stream.recv(4096)
    context = trusting(site.lab.ca)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    raw = socket.create_connection((LOOPBACK, site.port), 10)
    with raw, pytest.raises(ssl.SSLError, match=r"(?i)version"):
        context.wrap_socket(raw, server_hostname=LOOPBACK)


def test_who_guesses_has_to_wait(site, tmp_path):
    token = site.token()
    for _ in range(10):
        with pytest.raises(EnrolmentError):
            site.enrol(tmp_path / "guess", "pi-1:guess")
    with pytest.raises(TransportError, match="wait a minute"):
        site.enrol(tmp_path / "board", token)
    site.now_s += 61
    assert site.enrol(tmp_path / "board", token).fresh


def test_the_limit_counts_by_address_and_in_all():
    limit = RefusalLimit(2, 3)
    for address in ("a", "a", "b"):
        assert not limit.reached(address, 0.0)
        limit.count(address, 0.0)
    assert limit.reached("a", 1.0)
    assert limit.reached("c", 1.0)
    assert not limit.reached("a", 61.0)


def test_silent_strangers_are_cut_and_others_served_meanwhile(site, tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "_CONNECTION_S", 1.0)
    silent = [socket.create_connection((LOOPBACK, site.port), 10) for _ in range(8)]
    assert site.enrol(tmp_path / "board", site.token()).fresh
    begin_s = time.monotonic()
    for stranger in silent:
        assert stranger.recv(1) == b""
        stranger.close()
    assert time.monotonic() - begin_s < 5


def test_two_programs_that_enrol_one_board_at_once_leave_one_identity(site, tmp_path):
    board, token, done = tmp_path / "board", site.token(), []
    threads = [
        threading.Thread(target=lambda: done.append(site.enrol(board, token))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(d.fresh for d in done) == [False, False, True]
    TlsFiles.in_folder(board).context()


def test_two_boards_with_one_token_one_gets_in(site):
    """Both requests at once: the ledger's lock decides."""
    token, outcomes = site.token(), []

    def attempt():
        try:
            site.lab.authority.redeem(token, request("pi-1", new_key()), site.now_s)
            outcomes.append("in")
        except EnrolmentError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("in") == 1
