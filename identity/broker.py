"""The folder that a broker runs with: its certificate, the access list, the revocation list."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from identity.access import (
    ACL_FILE,
    CONFIGURATION_FILE,
    CRL_FILE,
    Listener,
    access_list,
    lab_configuration,
)
from identity.authority import Authority
from identity.errors import AuthorityError
from identity.files import (
    BROKER_FILE,
    BROKER_KEY_FILE,
    make_folder,
    read,
    write_private,
    write_public,
)
from wire_protocol.tls import CA_FILE

_REMEDY: Final = "restore the authority's folder from a copy"


def write_broker_folder(
    authority: Authority, out: Path, host: str, port: int, now_s: float
) -> None:  # fmt: skip
    """Write everything a mosquitto needs into `out`. Raises IdentityError."""
    if out.resolve() == authority.folder.resolve():
        raise AuthorityError(
            f"{out}: is the authority's folder, whose keys no broker should reach; give another "
            "--out"
        )
    make_folder(out)
    for name in (CA_FILE, BROKER_FILE):
        write_public(out / name, read(authority.folder / name, _REMEDY))
    write_private(out / BROKER_KEY_FILE, read(authority.folder / BROKER_KEY_FILE, _REMEDY))
    _write_lists(authority, out, now_s)
    configuration = lab_configuration(Listener(host, port, out.resolve()))
    write_public(out / CONFIGURATION_FILE, configuration.encode())


def refresh_broker_folder(authority: Authority, out: Path, now_s: float) -> None:
    """Write access list and revocation list again. Raises IdentityError."""
    if not (out / CRL_FILE).exists():
        raise AuthorityError(f"{out}: no broker's folder; write it: musplit ca broker-config --out")
    _write_lists(authority, out, now_s)


def _write_lists(authority: Authority, out: Path, now_s: float) -> None:
    ledger = authority.ledger()
    write_public(out / ACL_FILE, access_list(ledger.fleets, ledger.muted(now_s)).encode())
    write_public(out / CRL_FILE, authority.revocation_list(now_s))
