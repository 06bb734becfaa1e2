"""Who may say and hear what on a broker: mosquitto's configuration and access list.

Both follow from the topic tree. docs/security.md shows the same rules as a table, which the tests
hold against a real broker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from identity.files import BROKER_FILE, BROKER_KEY_FILE
from wire_protocol.errors import IdentityError
from wire_protocol.frames import MAX_FRAME_BYTES
from wire_protocol.tls import CA_FILE
from wire_protocol.topics import Topics, check_name

CONFIGURATION_FILE: Final = "mosquitto.conf"
ACL_FILE: Final = "acl"
CRL_FILE: Final = "crl.pem"
_ANY_DEVICE: Final = "+"
_MOST_NAME: Final = 64  # of a common name
_ITSELF: Final = "%u"  # mosquitto puts the certificate's common name there

_INSTRUCTIONS: Final = """\
# Written by musplit ca broker-config. To try it: mosquitto -c {folder}/mosquitto.conf
# As a service: write it with --out /etc/mosquitto/musplit, chown -R mosquitto: that folder, and
# link this file into /etc/mosquitto/conf.d/.
# After `musplit ca revoke`, or when the broker's certificate was renewed, write the folder again,
# then kill -HUP $(pidof mosquitto): new connections of the revoked are refused, and those that are
# open lose all rights.
"""


class Listener(NamedTuple):
    """Where a broker listens; `tls` is the folder of its certificate, or None for a plain one."""

    host: str
    port: int
    tls: Path | None = None
    max_packet_bytes: int = 0  # 0: room for the largest frame


def server_name(fleet: str) -> str:
    """The common name of a fleet's server; no device id begins with an underscore.

    Raises InputError.
    """
    name = f"_server.{check_name(fleet, 'fleet')}"
    if len(name) > _MOST_NAME:
        most = _MOST_NAME - len("_server.")
        raise IdentityError(f"fleet {fleet!r}: with certificates at most {most} characters")
    return name


def access_list(fleets: Sequence[str], muted: Sequence[str]) -> str:
    """The acl file of these fleets.

    `muted` are revoked names: they lose a connection's rights too when the broker reloads this.
    """
    lines = ["# Written by musplit; mosquitto reads it again on SIGHUP."]
    for name in muted:
        lines += ["", "# Revoked: nothing, also where it is still connected.", f"user {name}"]
        lines += ["topic deny #"]
    for fleet in fleets:
        lines += ["", f"# The server of fleet {fleet}: hears its devices, speaks to them."]
        lines += [f"user {server_name(fleet)}"]
        lines += [f"topic deny {Topics(other).root}/#" for other in fleets if other != fleet]
        lines += _server_rules(Topics(fleet))
    lines += ["", "# Every device, as itself: %u is the name in its certificate."]
    for fleet in fleets:
        lines += _device_rules(Topics(fleet))
    return "\n".join(lines) + "\n"


def mosquitto_configuration(listener: Listener) -> str:
    """A configuration that keeps nothing on disk and drops nothing a fleet sends."""
    lines = [
        f"listener {listener.port} {listener.host}",
        *(["allow_anonymous true"] if listener.tls is None else _tls_lines(listener.tls)),
        "persistence false",
        "set_tcp_nodelay true",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        # mosquitto 2.1 cuts connections at 2,000,000 bytes unless told otherwise.
        f"max_packet_size {listener.max_packet_bytes or MAX_FRAME_BYTES + 65536}",
        # The default of 1000 drops messages while the publisher is told success.
        "max_queued_messages 100000",
    ]
    return "\n".join(lines) + "\n"


def lab_configuration(listener: Listener) -> str:
    """The same for a lab's own mosquitto, with instructions; `listener.tls` is its folder."""
    return _INSTRUCTIONS.format(folder=listener.tls) + mosquitto_configuration(listener)


def _server_rules(topics: Topics) -> Iterator[str]:
    yield from (f"topic read {name}" for name in topics.all_uplinks)
    yield f"topic write {topics.broadcast}"
    yield f"topic write {topics.down(_ANY_DEVICE)}"


def _device_rules(topics: Topics) -> Iterator[str]:
    yield f"pattern write {topics.control(_ITSELF)}"
    yield f"pattern write {topics.frame(_ITSELF)}"
    yield f"pattern read {topics.down(_ITSELF)}"
    yield f"pattern read {topics.broadcast}"


def _tls_lines(folder: Path) -> Iterator[str]:
    place = folder.resolve()
    if os.geteuid() == 0:
        # Started as root, mosquitto would become a user who cannot read the key.
        yield "user root"
    yield from (
        "# TLS 1.3, both sides with a certificate of the lab's CA; revoked ones are refused.",
        f"cafile {place / CA_FILE}",
        f"certfile {place / BROKER_FILE}",
        f"keyfile {place / BROKER_KEY_FILE}",
        f"crlfile {place / CRL_FILE}",
        "tls_version tlsv1.3",
        "require_certificate true",
        "# The name in the certificate is user and client id, whatever a client says: it acts as",
        "# itself alone, and cannot put another off by connecting with its id.",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        f"acl_file {place / ACL_FILE}",
    )
