"""How a device takes part in a fleet."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from edge_client.bundle import Bundle, read_bundle
from edge_client.errors import BundleError
from edge_client.pacing import Pacing
from edge_client.stand_in import StandIn
from identity.errors import UntrustedError
from wire_protocol.messages import Welcome


class AgentSettings(NamedTuple):
    """What the command line says; times in seconds."""

    device_id: str
    fleet: str
    threads: int = 1
    speed: float = 1.0
    delay_s: float = 0.0
    stand_in: StandIn | None = None  # stands instead of speed and delay_s
    bundle: Path | None = None
    identity: Path | None = None  # where signer.pub lies; without it bundles need no signature
    wait_s: float = 600.0  # for a server to answer the join
    offline_s: float = 300.0  # for a lost broker to come back

    def pacing(self, welcome: Welcome, bundle: Bundle) -> Pacing:
        """How slow the device is made, of this run's model."""
        if self.stand_in is None:
            return Pacing(self.speed, delay_s=lambda _: self.delay_s)
        return self.stand_in.pacing(welcome, bundle)

    def read_bundle(self) -> Bundle | None:
        """The one of --bundle. Raises BundleError, or UntrustedError where signatures count."""
        if self.bundle is None:
            return None
        try:
            return read_bundle(self.bundle)
        except BundleError as error:
            if self.identity is None:
                raise
            raise UntrustedError(f"{error}; nothing of it is run") from error

    def check_signature(self, welcome: Welcome) -> None:
        """Before anything of the bundle is fetched or run. Raises UntrustedError."""
        if self.identity is not None:
            # Ten megabytes that a device without an identity does not pay.
            from identity.signatures import check_bundle  # noqa: PLC0415

            check_bundle(self.identity, welcome.manifest_sha256, welcome.bundle_signature)
