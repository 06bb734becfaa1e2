"""What the authority remembers: certificates, tokens, fleets; and its audit log.

ledger.json    rewritten whole, synced and renamed, under a lock; no secret is in it
audit.jsonl    one line per event: when, what, which device, from where, why
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from identity.errors import AuthorityError
from identity.files import read, write_private

LEDGER_FILE: Final = "ledger.json"
AUDIT_FILE: Final = "audit.jsonl"
_REMEDY: Final = "make an authority first: musplit ca init"

Role = Literal["device", "server", "broker"]
UnixSeconds = Annotated[int, Meta(ge=0, lt=253_402_300_800)]  # to the end of the year 9999
Serial = Annotated[str, Meta(pattern="^[0-9a-f]{1,40}$")]  # hexadecimal; RFC 5280 4.1.2.2


class Issued(Struct, frozen=True, forbid_unknown_fields=True):
    """A certificate; times in seconds of Unix time."""

    name: str
    role: Role
    serial: Serial
    issued_unix_s: UnixSeconds
    expires_unix_s: UnixSeconds
    key_sha256: str
    revoked_unix_s: UnixSeconds | None = None

    def live(self, now_s: float) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_unix_s is None and now_s < self.expires_unix_s


class Token(Struct, frozen=True, forbid_unknown_fields=True):
    """An enrolment token, by its SHA-256; the token itself is nowhere but with the device."""

    sha256: str
    device_id: str
    expires_unix_s: UnixSeconds
    used_unix_s: UnixSeconds | None = None
    key_sha256: str = ""  # of the key that it was used for
    void: bool = False


class Ledger(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that the authority remembers."""

    hosts: list[str]  # names and addresses of the broker
    fleets: list[str]
    certificates: list[Issued]
    tokens: list[Token]

    def muted(self, now_s: float) -> list[str]:
        """Devices that had a certificate revoked and have no other."""
        live = {issued.name for issued in self.certificates if issued.live(now_s)}
        revoked = {i.name for i in self.certificates if i.revoked_unix_s is not None}
        return sorted(revoked - live)


class LedgerFile:
    """The ledger in an authority's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        """There is an authority here."""
        return (self.folder / LEDGER_FILE).exists()

    def read(self) -> Ledger:
        """Raises AuthorityError."""
        path = self.folder / LEDGER_FILE
        if not path.exists():
            raise AuthorityError(f"{self.folder}: holds no authority; {_REMEDY}")
        try:
            return msgspec.json.decode(read(path, _REMEDY), type=Ledger)
        except ValueError as error:
            raise AuthorityError(f"{path}: damaged ({error}); restore it from a copy") from error

    def write(self, ledger: Ledger) -> None:
        """Replace the ledger. Raises IdentityError."""
        data = msgspec.json.format(msgspec.json.encode(ledger), indent=1)
        write_private(self.folder / LEDGER_FILE, data)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the ledger meanwhile. Raises AuthorityError."""
        try:
            lock = (self.folder / "lock").open("wb")
        except OSError as error:
            raise AuthorityError(f"{self.folder}: {error.strerror}; {_REMEDY}") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def audit(self, now_s: float, event: str, device_id: str, **facts: str) -> None:
        """Add a line to the audit log; never a token or a key. Raises AuthorityError."""
        path = self.folder / AUDIT_FILE
        when = datetime.fromtimestamp(int(now_s), UTC).isoformat()
        line = json.dumps({"time": when, "event": event, "device": device_id, **facts})
        try:
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise AuthorityError(
                f"{path}: cannot be written ({error.strerror}); free space, or mend its rights"
            ) from error
