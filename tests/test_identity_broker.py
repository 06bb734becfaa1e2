"""The table in docs/security.md against a real mosquitto, and everybody who must not get in."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import Bench
from identity_support import LOOPBACK, Client, Lab, Mosquitto, needs_mosquitto
from wire_support import wait_for

from identity.access import access_list
from identity.certificates import Purpose
from identity.files import BROKER_FILE, BROKER_KEY_FILE
from wire_protocol.errors import IdentityError, TransportError
from wire_protocol.mqtt import Address, Connected, Disconnected, Link
from wire_protocol.tls import tls_for
from wire_protocol.topics import Topics

pytestmark = needs_mosquitto
DOCS = Path(__file__).resolve().parents[1] / "docs" / "security.md"
VERBS = ("publish", "receive")
OWN = Topics("lab").control("pi-1")


class Cell(NamedTuple):
    who: str
    topic: str
    verb: str


def documented() -> dict[Cell, bool]:
    """Every cell of the table, as two verbs."""
    lines = DOCS.read_text().split("## Who may say and hear what")[1].split("\n## ")[0].splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    names = [name.strip("`") for name in rows[0][1:]]
    table: dict[Cell, bool] = {}
    for topic, *cells in rows[2:]:
        for name, cell in zip(names, cells, strict=True):
            assert cell in ("-", *VERBS, "publish, receive"), cell
            for verb in VERBS:
                table[Cell(name, topic.strip("`"), verb)] = verb in cell
    return table


TABLE = documented()
NAMES = list(dict.fromkeys(cell.who for cell in TABLE))
TOPICS = list(dict.fromkeys(cell.topic for cell in TABLE))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def observed(lab):
    """Who could do what: every identity at every topic, beside a tester that may do everything."""
    files = {n: lab.server(n.split(".")[1]) if n[0] == "_" else lab.enrol(n) for n in NAMES}
    with Mosquitto(lab) as broker:
        clients = {name: Client(broker.port, files[name]) for name in NAMES}
        lab.authority.revoke("pi-3", lab.now_s)
        broker.reload()
        tester = Client(broker.port, broker.tester)
        for client in (tester, *clients.values()):
            client.subscribe("#", "$SYS/#", *TOPICS)
        answers = {}
        for name, client in clients.items():
            for topic in TOPICS:
                answers[name, topic] = client.publish(topic, name.encode())
        for topic in TOPICS:
            tester.publish(topic, b"tester")
        tester.publish("the/end", b"")
        deadline_s = time.monotonic() + 10
        while ("the/end", b"") not in tester.received and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.5)  # the others' last messages
        heard = {name: set(client.received) for name, client in clients.items()}
        injected = set(tester.received)
        everybody = [client.connected for client in clients.values()]
        for client in (tester, *clients.values()):
            client.close()
    assert all(everybody)  # nobody was put off for asking
    system = {topic for topic, _ in injected if topic.startswith("$SYS/broker/version")}
    assert system  # the broker's own publication reaches who may hear it
    found: dict[Cell, bool] = {}
    for name in NAMES:
        for topic in TOPICS:
            arrived = (topic, name.encode()) in injected
            # What the acknowledgement says is what happened.
            assert arrived == (answers[name, topic] in ("Success", "No matching subscribers")) or (
                topic.startswith("$SYS")
            ), (name, topic, answers[name, topic])
            found[Cell(name, topic, "publish")] = arrived
            found[Cell(name, topic, "receive")] = bool(
                {t for t, payload in heard[name] if t == topic and payload != name.encode()}
            )
    for topic in TOPICS:  # the tester could reach every topic, so silence is a refusal
        assert topic.startswith("$SYS") or (topic, b"tester") in injected
    return found


@pytest.mark.parametrize("cell", TABLE, ids=["-".join(cell) for cell in TABLE])
def test_the_table_in_the_docs_is_what_the_broker_does(observed, cell):
    assert observed[cell] is TABLE[cell]


def test_the_table_speaks_of_the_whole_topic_tree():
    topics = Topics("lab")
    for device in ("pi-1", "pi-2"):
        assert {topics.down(device), topics.control(device), topics.frame(device)} <= set(TOPICS)
    assert topics.broadcast in TOPICS
    assert sum(TABLE.values()) == 29  # of 210 cells


def test_the_access_list_follows_the_topic_tree():
    text = access_list(["lab"], [])
    topics = Topics("lab")
    for rule in (
        f"topic read {topics.control('+')}", f"topic write {topics.broadcast}",
        f"pattern write {topics.frame('%u')}", f"pattern read {topics.down('%u')}",
    ):  # fmt: skip
        assert f"\n{rule}\n" in text


# -- who must not get in


@pytest.fixture(scope="module")
def broker(lab):
    with Mosquitto(lab) as broker:
        yield broker


def refusal(port, files, open_s=8.0) -> str:
    """What a link says of a broker that does not let it in."""
    link = Link(
        "lab/pi-1", Address(LOOPBACK, port), subscriptions=(Topics("lab").broadcast,), tls=files
    )  # fmt: skip
    with pytest.raises(TransportError) as caught:
        link.open(open_s)
    text = str(caught.value)
    assert "\n" not in text
    return text


def copied(files, folder, **changes):
    """An identity with some of its files replaced."""
    shutil.copytree(files.folder, folder)
    for name, source in changes.items():
        shutil.copy(source, folder / name.replace("_", "."))
    return type(files).in_folder(folder)


def test_an_expired_certificate(lab, broker):
    files = lab.forge("pi-old", days=0.5, age_days=2)

    def logged() -> bool:  # on a busy machine mosquitto does not tell each refusal's reason
        assert "our certificate has expired, or a clock is wrong" in refusal(broker.port, files)
        return "certificate verify failed" in broker.log

    assert wait_for(logged, 30.0)


def test_a_revoked_certificate(lab, broker):
    files = lab.enrol("pi-gone")
    lab.authority.revoke("pi-gone", lab.now_s)
    broker.reload()
    assert "our certificate was revoked; ask for a token" in refusal(broker.port, files)


def test_a_certificate_of_another_ca(lab, broker, tmp_path):
    """A stranger's CA on both sides, and a stranger's certificate with the right CA file."""
    other = Lab(tmp_path / "other")
    stranger = other.enrol("pi-1")
    assert "not from the CA in ca.pem" in refusal(broker.port, stranger)
    files = copied(stranger, tmp_path / "mixed", ca_pem=lab.ca)
    assert "our certificate is not from its CA" in refusal(broker.port, files)


def test_a_host_certificate_is_no_clients(lab, broker):
    files = lab.forge("pi-host", purpose=Purpose.HOST)
    assert "for another purpose" in refusal(broker.port, files)


def test_a_devices_certificate_is_no_brokers(lab, tmp_path):
    """Whoever has stolen a device cannot play the broker."""
    stolen = lab.enrol("pi-stolen")
    with Mosquitto(Lab(tmp_path / "fraud")) as fraud:
        pass  # only its folder is wanted
    for source, name in ((stolen.certificate, BROKER_FILE), (stolen.key, BROKER_KEY_FILE)):
        shutil.copy(source, fraud.folder / name)
    with fraud:
        assert "no broker's: a fraud" in refusal(fraud.port, lab.enrol("pi-1"))


def test_no_certificate(lab, broker):
    client = Client(broker.port, None, ca=lab.ca)
    time.sleep(0.3)
    assert not client.connected
    client.close()


def test_a_plain_link_is_told_that_the_broker_may_want_tls(broker):
    assert "speaks TLS only (--identity)" in refusal(broker.port, None, open_s=3.0)


def test_tls_to_a_plain_broker_is_told_apart(lab, tmp_path):
    with Bench(tmp_path) as bench:
        port = bench.broker().port
        assert "is that the port of its TLS" in refusal(port, lab.enrol("pi-1"), open_s=0.5)


def test_a_name_that_the_brokers_certificate_lacks(lab, broker):
    link = Link(
        "x", Address("127.0.0.2", broker.port), subscriptions=("x",), tls=lab.enrol("pi-1")
    )  # fmt: skip
    with pytest.raises(TransportError, match=r"cannot be reached|broker-config --host"):
        link.open(0.5)


def test_nobody_is_put_off_by_another_with_its_client_id(lab, broker):
    """The broker names clients by their certificates."""
    owner = Client(broker.port, lab.enrol("pi-1"), client_id="lab/pi-1")
    thieves = [
        Client(broker.port, lab.enrol("pi-2"), client_id=name) for name in ("pi-1", "lab/pi-1")
    ]
    time.sleep(0.5)
    assert owner.connected
    assert owner.publish(OWN, b"still here") in ("Success", "No matching subscribers")
    assert thieves[1].publish(OWN, b"as pi-1") == "Not authorized"
    for client in (owner, *thieves):
        client.close()


def test_a_last_will_is_ones_own(lab, broker):
    """A device that dies cannot say goodbye for another."""
    tester = Client(broker.port, broker.tester)
    tester.subscribe("#")
    own = Topics("lab").control("pi-7")
    mortals = [
        Client(broker.port, lab.enrol("pi-6"), will=own),
        Client(broker.port, lab.enrol("pi-7"), will=own),
    ]
    mortals[0].drop()
    time.sleep(0.5)
    assert not tester.received
    mortals[1].drop()
    time.sleep(0.5)
    assert tester.received == [(own, b"will")]
    for client in (*mortals, tester):
        client.close()


def test_a_link_that_is_revoked_while_it_is_away_ends_with_the_reason(lab):
    """The broker restarts, and does not take it back: no endless reconnecting."""
    with Mosquitto(lab) as broker:
        link = Link(
            "x", Address(LOOPBACK, broker.port), tls=lab.enrol("pi-8"),
            subscriptions=(Topics("lab").broadcast,),
        )  # fmt: skip
        link.open(8.0)
        assert isinstance(link.next_event(1), Connected)
        lab.authority.revoke("pi-8", lab.now_s)
        broker.reload()
    events = []
    with broker:
        deadline_s = time.monotonic() + 15
        while time.monotonic() < deadline_s and not (events and events[-1].fatal):
            event = link.next_event(0.2)
            events += [event] if isinstance(event, Disconnected) else []
        link.close()
    assert "our certificate was revoked" in events[-1].reason


def test_large_messages_pass_both_ways_over_tls(lab, broker):
    """16 KiB records, reads and writes of two threads."""
    topics = Topics("lab")
    server = Link(
        "lab//server", Address(LOOPBACK, broker.port), subscriptions=topics.all_uplinks,
        tls=lab.server("lab"),
    )  # fmt: skip
    device = Link(
        "lab/pi-1", Address(LOOPBACK, broker.port), tls=lab.enrol("pi-1"),
        subscriptions=(topics.down("pi-1"), topics.broadcast),
    )  # fmt: skip
    up, down = bytes(range(256)) * 12_000, bytes(range(255, -1, -1)) * 9_000
    try:
        for link in (server, device):
            link.open(8.0)
            assert isinstance(link.next_event(1), Connected)
        for _ in range(8):
            device.publish(topics.frame("pi-1"), up)
            server.publish(topics.down("pi-1"), down)
        for link, payload in ((server, up), (device, down)):
            for _ in range(8):
                assert bytes(link.next_event(20).payload) == payload
    finally:
        server.close()
        device.close()


# -- the rule beyond loopback


def test_beyond_loopback_it_is_a_certificate_or_a_typed_word(tmp_path):
    far, near = Address("192.0.2.1", 8883), Address(LOOPBACK, 1883)
    with pytest.raises(IdentityError, match=r"--identity DIR .*--insecure"):
        tls_for(far, None, insecure=False)
    assert tls_for(far, None, insecure=True) is None
    assert tls_for(near, None, insecure=False) is None
    assert tls_for(Address("::1", 1), None, insecure=False) is None
    assert tls_for(far, tmp_path, insecure=False).key == tmp_path / "device.key"
    with pytest.raises(IdentityError, match="exclude each other"):
        tls_for(far, tmp_path, insecure=True)


def test_the_configuration_is_explained_and_has_no_plain_listener(broker):
    text = (broker.folder / "mosquitto.conf").read_text()
    assert re.findall(r"^(?:listener|port) .*$", text, re.MULTILINE) == [
        f"listener {broker.port} {LOOPBACK}"
    ]
    for line in ("tls_version tlsv1.3", "require_certificate true", "allow_anonymous false"):
        assert f"\n{line}\n" in text
