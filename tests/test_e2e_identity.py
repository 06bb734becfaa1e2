"""A lab from `musplit ca init` to a trained model over TLS; every refusal in the device's log."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result
from harness import (
    DIGITS,
    LOOPBACK,
    TINY,
    Bench,
    Child,
    Digests,
    free_port,
    make_shards,
    undisturbed,
)
from identity_support import Lab, needs_mosquitto
from msgspec.structs import replace

from identity.signatures import sign_bundle
from musplit.cli import main
from wire_protocol.directions import directions_digest
from wire_protocol.manifest import sha256
from wire_protocol.messages import (
    CHUNK_BYTES,
    Chunk,
    DownMessage,
    Fetch,
    Join,
    Welcome,
    decode_up,
    encode,
)
from wire_protocol.mqtt import Address, Link, Received
from wire_protocol.tls import TlsFiles
from wire_protocol.topics import Topics

pytestmark = needs_mosquitto
needs_run = pytest.mark.usefixtures("trained")
DEVICES = ("device-000", "device-001")
TOPICS = Topics("lab")


def command(*arguments: str) -> Result:
    """A command in this process: starting another one takes longer than most of them."""
    return CliRunner().invoke(main, list(arguments))


class Site:
    """The lab that the commands have made: authority, broker, two enrolled devices."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.shards = make_shards(bench.folder / "shards")
        self.broker, self.enrolment = (Address(LOOPBACK, free_port()) for _ in range(2))
        self.ok("ca", "init")
        self.ok("ca", "broker-config", "--out", str(bench.folder / "broker"))
        service = bench.start("ca", "serve", "--listen", str(self.enrolment))
        broker = bench.start("broker", "--listen", str(self.broker), "--tls", "broker")
        service.wait_for("listening on")
        broker.wait_for("listening on")
        self.broker_log, self.service_log = broker, service
        self.tokens = [self.token(name) for name in DEVICES]
        for name in DEVICES:
            assert self.enrol(name).code == 0

    @property
    def ca(self) -> Path:
        return self.bench.folder / "musplit-ca"

    @property
    def server(self) -> Path:
        return self.ca / "servers" / "lab"

    def identity(self, name: str) -> Path:
        return self.bench.folder / "identities" / name

    def ok(self, *arguments: str) -> str:
        """Run a command of the authority; returns what it printed."""
        done = command(*arguments[:2], "--dir", str(self.ca), *arguments[2:])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    def token(self, name: str) -> str:
        self.ok("ca", "enroll", name, "--out", str(self.bench.folder / f"{name}.token"))
        return (self.bench.folder / f"{name}.token").read_text().strip()

    def enrol(self, name: str, *, token: str = "", identity: Path | None = None) -> Child:
        return self.bench.run(
            "enroll", "--url", f"https://{self.enrolment}", "--ca", str(self.ca / "ca.pem"),
            "--token-file", token or f"{name}.token", "--identity",
            str(identity or self.identity(name)), "--format", "json",
        )  # fmt: skip

    def device(self, identity: Path, *more: str, name: str = DEVICES[0]) -> Child:
        return self.bench.device(
            name, self.broker, self.shards[0], "--identity", str(identity), "--connect-s", "8",
            "--wait-s", "20", *more,
        )  # fmt: skip

    def refusal(self, identity: Path, *more: str, code: int) -> str:
        """The one line that the device ends with."""
        child = self.device(identity, *more)
        assert child.finish() == code, child.stderr
        last = child.stderr.splitlines()[-1]
        assert last.startswith("musplit: error: ")
        return last

    def changed(self, name: str, change: Callable[[Path], object]) -> Path:
        """A copy of the first device's identity with something else in it."""
        folder = self.identity(name)
        shutil.copytree(self.identity(DEVICES[0]), folder)
        change(folder)
        return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with Bench(tmp_path_factory.mktemp("site")) as bench:
        yield Site(bench)


@pytest.fixture(scope="module")
def trained(site):
    """A run over TLS: the server, its summary, and the devices."""
    server = site.bench.serve(
        site.broker, site.bench.folder / "run", TINY, "--identity", str(site.server),
        "--format", "json",
    )  # fmt: skip
    devices = [
        site.bench.device(n, site.broker, s, "--identity", str(site.identity(n)))
        for n, s in zip(DEVICES, site.shards, strict=True)
    ]
    assert server.finish(240) == 0, server.stderr
    assert [device.finish() for device in devices] == [0, 0], devices[0].stderr
    return server, json.loads(server.stdout.splitlines()[-1]), devices


def test_a_run_over_tls_ends_with_the_digests_of_a_plain_one(trained):
    _, summary, devices = trained
    assert Digests.of(summary) == undisturbed(TINY)
    for device in devices:
        assert "over TLS 1.3" in device.stderr


def test_the_server_prints_the_command_for_a_device_with_an_identity(trained):
    waiting = [json.loads(line) for line in trained[0].stdout.splitlines()]
    command = next(e["command"] for e in waiting if e["event"] == "waiting")
    assert "--identity identity" in command


def test_enrolling_again_changes_nothing_and_the_token_is_gone(site):
    again = site.enrol(DEVICES[0])
    assert json.loads(again.stdout) | {"expires_unix_s": 0} == {
        "device_id": DEVICES[0], "fresh": False, "expires_unix_s": 0,
        "identity": str(site.identity(DEVICES[0])),
    }  # fmt: skip
    assert not (site.bench.folder / f"{DEVICES[0]}.token").exists()


def test_a_replayed_and_an_expired_token_are_refused_with_their_reason(site):
    used = site.bench.folder / "used.token"
    used.write_text(site.tokens[0])
    replayed = site.enrol("thief", token=str(used))
    assert (replayed.code, "used already" in replayed.stderr) == (5, True)
    assert used.exists()
    late = str(site.bench.folder / "late.token")
    site.ok("ca", "enroll", "late", "--out", late, "--valid-h", "0.0000001")
    expired = site.enrol("late")
    assert (expired.code, "expired at" in expired.stderr) == (5, True)
    audit = (site.ca / "audit.jsonl").read_text()
    for reason in ("used already", "expired at"):
        assert reason in audit
        assert reason in site.service_log.stderr


def test_the_list_shows_who_is_who(site):
    entries = json.loads(site.ok("ca", "list", "--format", "json"))["entries"]
    states = {(e["name"], e["role"], e["state"]) for e in entries}
    assert {("_broker", "broker", "valid"), ("_server.lab", "server", "valid"),
            (DEVICES[0], "device", "valid")} <= states  # fmt: skip


def test_no_identity_beyond_loopback(site):
    for what in (("device", "--id", "x", "--data", str(site.shards[0])), ("serve", str(DIGITS))):
        done = command(*what, "--broker", "192.0.2.1")
        assert done.exit_code == 3
        assert "beyond loopback a certificate is needed; give --identity DIR" in done.stderr
    done = command("broker", "--listen", "0.0.0.0")
    assert (done.exit_code, "--tls DIR" in done.stderr) == (3, True)


def test_a_key_that_others_can_read(site):
    folder = site.changed("open-key", lambda f: (f / "device.key").chmod(0o640))
    assert f"chmod 600 {folder / 'device.key'}" in site.refusal(folder, code=3)


def test_no_certificate(site):
    folder = site.changed("empty", lambda f: (f / "device.pem").unlink())
    assert "enrol this machine: musplit enroll" in site.refusal(folder, code=3)


def test_a_ca_of_another_lab(site, tmp_path):
    stranger = Lab(tmp_path).enrol(DEVICES[0]).folder
    assert "not from the CA in ca.pem" in site.refusal(stranger, code=4)
    shutil.copy(site.ca / "ca.pem", stranger / "ca.pem")
    assert "our certificate is not from its CA" in site.refusal(stranger, code=4)


def test_a_board_in_1970_says_what_its_clock_says(site, tmp_path):
    """Here: a CA that will be made tomorrow, which is the same to the board."""
    broker = tmp_path / "broker"
    shutil.copytree(site.bench.folder / "broker", broker)
    lab = Lab(tmp_path / "lab", Lab(tmp_path / "now").now_s + 3 * 86400)
    for name in ("ca.pem", "broker.pem", "broker.key"):
        shutil.copy(lab.folder / "ca" / name, broker / name)
    (broker / "crl.pem").write_bytes(lab.authority.revocation_list(lab.now_s))
    address = Address(LOOPBACK, free_port())
    site.bench.start("broker", "--listen", str(address), "--tls", str(broker)).wait_for("listening")
    child = site.bench.device(
        "early", address, site.shards[0], "--identity", str(lab.enrol("early").folder)
    )
    assert child.finish() == 4
    assert "is not valid yet: this machine's clock says 20" in child.stderr
    assert "NTP" in child.stderr


def test_a_revoked_device_is_refused_once_the_broker_has_read_the_list(site):
    site.token("gone")
    assert site.enrol("gone").code == 0
    site.ok("ca", "revoke", "gone", "--broker", str(site.bench.folder / "broker"))
    site.broker_log.wait_for("revocation list read again")
    child = site.device(site.identity("gone"), name="gone")
    assert child.finish() == 4
    assert "our certificate was revoked; ask for a token and enrol anew" in child.stderr
    assert "certificate verify failed" in site.broker_log.stderr


# -- signatures: a server that has a certificate of the lab, and other intentions


class FakeServer:
    """Welcomes the device to the run of a real bundle, with what `spoil` makes of it."""

    def __init__(self, site: Site, bundle: Path, *, sign: bool, spoil: bool = False) -> None:
        names = "manifest.json", "client.onnx", "weights.bin"
        blobs = [(bundle / name).read_bytes() for name in names]
        self._files = {sha256(blob): blob for blob in blobs}
        manifest = blobs[0]
        digest = sha256(manifest)
        self._welcome = Welcome(
            run=1, run_seed=0, epoch=0, device=0, manifest_sha256=digest,
            manifest_bytes=len(manifest), directions_sha256=directions_digest(0), lam=0.01,
            batch=8, directions=1, rounds=1, encoding="float32", compression="none", next_round=0,
            feedback="loss_difference", optimiser="sgd", momentum=0.0, beta2=0.0,
            asynchronous=False,
            bundle_signature=sign_bundle(site.server, digest) if sign else b"",
        )  # fmt: skip
        self._spoil = spoil
        self.fetched: set[str] = set()
        self._link = Link(
            "lab//server", site.broker, subscriptions=TOPICS.all_uplinks,
            tls=TlsFiles.in_folder(site.server),
        )  # fmt: skip

    def meet(self, child: Child) -> None:
        """Answer until the device ends."""
        self._link.open(8.0)
        try:
            while child.code is None:
                event = self._link.next_event(0.2)
                if isinstance(event, Received):
                    self._answer(decode_up(event.payload))
        finally:
            self._link.close()

    def _answer(self, message: object) -> None:
        if isinstance(message, Join):
            self._send(replace(self._welcome, epoch=message.epoch))
        elif isinstance(message, Fetch):
            self.fetched.add(message.digest)
            data = self._files[message.digest]
            for index in range(message.first, message.first + message.count):
                piece = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
                if self._spoil and message.digest != self._welcome.manifest_sha256:
                    piece = piece[:-1] + bytes([piece[-1] ^ 1]) if piece else piece
                if piece:
                    self._send(Chunk(message.digest, index, piece))

    def _send(self, message: DownMessage) -> None:
        self._link.publish(TOPICS.down(DEVICES[0]), encode(message))


def _meets(site: Site, identity: Path, *, sign: bool, spoil: bool = False) -> tuple[str, set[str]]:
    state = site.bench.folder / f"state-{identity.name}-{sign}-{spoil}"
    server = FakeServer(site, site.bench.folder / "run" / "client", sign=sign, spoil=spoil)
    child = site.device(identity, "--state", str(state))
    server.meet(child)
    assert child.code == 7, child.stderr
    assert len([line for line in child.stderr.splitlines() if "musplit: error" in line]) == 1
    return child.stderr.splitlines()[-1], server.fetched


@needs_run
def test_an_unsigned_bundle_is_not_even_fetched(site):
    why, fetched = _meets(site, site.identity(DEVICES[0]), sign=False)
    assert "is not signed: nothing of it is run" in why
    assert not fetched


@needs_run
def test_a_bundle_signed_by_another_key_is_not_even_fetched(site, tmp_path):
    stranger = Lab(tmp_path).folder / "ca" / "signer.pub"
    folder = site.changed("stranger", lambda f: shutil.copy(stranger, f / "signer.pub"))
    why, fetched = _meets(site, folder, sign=True)
    assert "signed by another key than" in why
    assert not fetched


@needs_run
def test_a_bundle_altered_on_its_way_is_not_run(site):
    why, _ = _meets(site, site.identity(DEVICES[0]), sign=True, spoil=True)
    assert "was altered on its way: nothing of it is run" in why


@needs_run
def test_an_altered_bundle_on_the_board_is_not_run(site, tmp_path):
    shutil.copytree(site.bench.folder / "run" / "client", tmp_path / "client")
    with (tmp_path / "client" / "weights.bin").open("r+b") as file:
        file.write(b"\x01")
    why = site.refusal(site.identity(DEVICES[0]), "--bundle", str(tmp_path / "client"), code=7)
    assert "nothing of it is run" in why


@needs_run
def test_no_signer_is_no_way_around(site):
    folder = site.changed("no-signer", lambda f: (f / "signer.pub").unlink())
    server = FakeServer(site, site.bench.folder / "run" / "client", sign=True)
    child = site.device(folder, "--state", str(folder / "state"))
    server.meet(child)
    assert (child.code, "signer.pub" in child.stderr) == (3, True)


# -- secrets


@needs_run
def test_secrets_are_in_no_log_and_on_no_command_line(site):
    """While a board waits for a service that says nothing."""
    token = site.token("quiet")
    with socket.create_server((LOOPBACK, 0)) as deaf:
        child = site.bench.start(
            "enroll", "--url", f"https://{LOOPBACK}:{deaf.getsockname()[1]}", "--ca",
            str(site.ca / "ca.pem"), "--token-file", "quiet.token", "--identity", "quiet",
        )  # fmt: skip
        connection, _ = deaf.accept()
        process = psutil.Process(child.pid)
        seen = " ".join([*process.cmdline(), *process.environ().values()])
        connection.close()
    child.finish()
    assert (child.code, "musplit: error: enrolment service" in child.stderr) == (4, True)
    secrets = [t.partition(":")[2] for t in (token, *site.tokens)]
    secrets += [
        line for path in site.bench.folder.rglob("*.key")
        for line in path.read_text().splitlines() if not line.startswith("---")
    ]  # fmt: skip
    logs = [*(site.bench.folder / "bench-logs").iterdir(), site.ca / "audit.jsonl"]
    text = seen + "".join(path.read_text(errors="replace") for path in logs)
    assert len(text) > 2000
    assert not [secret for secret in secrets if secret in text]


def test_another_name_than_the_certificates_is_told_at_once(site):
    """The broker would go by the certificate, and nobody would hear the device."""
    shard, broker = str(site.shards[0]), str(site.broker)
    identity = ("--identity", str(site.identity(DEVICES[0])))
    done = command("device", "--id", "pi-9", "--broker", broker, "--data", shard, *identity)
    assert (done.exit_code, "of 'device-000', not of 'pi-9'" in done.stderr) == (3, True)


def test_a_brokers_key_that_others_can_read(site, tmp_path):
    folder = tmp_path / "broker"
    shutil.copytree(site.bench.folder / "broker", folder)
    (folder / "broker.key").chmod(0o644)
    done = command("broker", "--tls", str(folder))
    assert (done.exit_code, f"chmod 600 {folder / 'broker.key'}" in done.stderr) == (3, True)
