"""What the link takes from inside paho: a new paho must be looked at before it is trusted."""

from __future__ import annotations

import hashlib
import inspect
import re
from importlib.metadata import version

import paho.mqtt.client as paho

from wire_protocol.mqtt_stream import PacketReader
from wire_protocol.paho_client import CountingClient, Version

REVIEWED = "2.2.0"
# SHA-256, its first 16 digits, of the source of what is overridden or called from outside.
DIGESTS = {
    "_packet_read": "bbe32d8af1e37955",
    "_packet_write": "d097b7b51bed128d",
    "_packet_queue": "e298fa9ab31e5f79",
    "_packet_handle": "ac4c129ed409db42",
    "_handle_publish": "1bbaa3ef0e3afc6d",
    "_handle_pubackcomp": "04d39ba283b1f3be",
    "_do_on_publish": "5bbcad6f9447107a",
    "_send_puback": "bb015cefb632f942",
    "_sock_send": "300d9f1031bd0dbd",
    "_sock_recv": "c3b9043a46dd81b7",
    "_loop": "7372a4c2fc81b7f4",
    "loop_read": "4fa11ca2d451dbec",
    "loop_write": "57c360e5ae749fd9",
    "_create_socket": "3043436f2eb23690",
    "_ssl_wrap_socket": "a71513b1452dc33b",
    "reconnect": "3ecdf1a8299e8c8a",
    "_messages_reconnect_reset_out": "464a42c69618a49b",
}
REVIEW = (
    "paho {installed} has another {name} than {reviewed}: compare wire_protocol/paho_client.py "
    "with it (locks, states of _out_messages, who calls it from which thread), then take over "
    "its digest"
)


def digest(name: str) -> str:
    source = inspect.getsource(getattr(paho.Client, name))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def test_paho_is_the_version_that_was_reviewed() -> None:
    changed = [name for name, known in DIGESTS.items() if digest(name) != known]
    text = REVIEW.format(installed=version("paho-mqtt"), name=", ".join(changed), reviewed=REVIEWED)
    assert not changed, text


def test_the_overridden_methods_keep_their_parameters() -> None:
    for name in ("_packet_read", "_packet_write", "_packet_queue", "_sock_send", "reconnect"):
        ours, theirs = (
            list(inspect.signature(getattr(kind, name)).parameters)
            for kind in (CountingClient, paho.Client)
        )
        assert ours == theirs, name


def test_every_private_name_that_the_client_uses_exists_in_paho() -> None:
    source = inspect.getsource(CountingClient)
    own = set(vars(CountingClient)) | {
        "_max_payload_bytes", "_deliver", "_write_lock", "_reader", "_tls_lock",
    }  # fmt: skip
    used = set(re.findall(r"(?:self|super\(\))\.(_[a-z]\w+)", source)) - own
    plain = paho.Client(paho.CallbackAPIVersion.VERSION2)
    assert used
    assert not [name for name in used if not hasattr(plain, name)]


def test_paho_reads_and_writes_its_socket_in_two_places_only() -> None:
    """Elsewhere bytes would go uncounted."""
    raw = {
        name
        for name, method in inspect.getmembers(paho.Client, inspect.isfunction)
        if re.search(
            r"_sock\.(send|sendall|recv|recv_into|read|write)\(", inspect.getsource(method)
        )
    }
    assert raw == {"_sock_send", "_sock_recv"}
    callers = {
        name
        for name, method in inspect.getmembers(paho.Client, inspect.isfunction)
        if "_sock_recv(" in inspect.getsource(method)
    }
    assert callers == {"_sock_recv", "_packet_read"}


def test_unacknowledged_messages_are_counted_and_the_largest_named() -> None:
    client = CountingClient("x", Version.MQTTv5, 1 << 20, lambda _topic, _payload: None)
    assert client.unsent_messages == 0
    client.publish("x", bytes(10), qos=1)
    assert client.unsent_messages == 1
    assert client.largest_in_flight == (0, 0)  # never sent: there is no connection
    assert isinstance(client._reader, PacketReader)
