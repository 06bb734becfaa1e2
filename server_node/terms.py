"""The terms of a run, out of its configuration: what the coordinator and every device go by."""

from __future__ import annotations

import math
from typing import NamedTuple

from server_node.actions import Rules
from server_node.config import Config
from server_node.journal import Header
from wire_protocol.directions import directions_digest
from wire_protocol.frames import HEADER_BYTES
from wire_protocol.manifest import Manifest
from wire_protocol.messages import Welcome


class Terms(NamedTuple):
    """They stay the same for the whole run."""

    config: Config
    header: Header
    manifest: Manifest  # of the client half

    @property
    def asynchronous(self) -> bool:
        """Each contribution is applied on its arrival."""
        return self.config.round.mode == "asynchronous"

    @property
    def directions(self) -> int:
        """K that devices are asked for."""
        return self.config.method.directions(self.manifest.parameters)

    @property
    def compressed_max_bytes(self) -> int:
        """What a compressed frame of this run may grow to; 0 when none is agreed."""
        if self.config.wire.compression == "none":
            return 0
        batch = self.config.devices.batch
        elements = batch * math.prod(self.manifest.activation.shape) * max(1, self.directions)
        return HEADER_BYTES + 4 * (elements + batch)

    @property
    def rules(self) -> Rules:
        """For the coordinator, of either mode."""
        config, method, rule = self.config, self.config.method, self.config.round
        return Rules(
            run_seed=config.run.seed, rounds=config.run.rounds, participants=config.participants,
            tau=method.tau, directions=self.directions, quorum=rule.quorum,
            deadline_s=rule.deadline_s, rejoin_s=rule.rejoin_s, stall_s=rule.stall_s,
            replicas=config.server.replicas,
            tau_cap=method.tau_cap if method.tau_mode == "adaptive" else 0,
            staleness_limit=rule.staleness_limit,
            cut_gradient=method.feedback == "cut_gradient", pooled=method.server_batch == "pooled",
            first_order=method.server_order == "first",
        )  # fmt: skip

    def welcome(self, device: int, epoch: int, manifest_bytes: int, next_round: int) -> Welcome:
        """For a device, by index; `next_round` is the one that comes next."""
        config, method = self.config, self.config.method
        return Welcome(
            run=self.header.run, run_seed=config.run.seed, epoch=epoch, device=device,
            manifest_sha256=self.header.manifest_sha256, manifest_bytes=manifest_bytes,
            directions_sha256=directions_digest(config.run.seed), lam=method.lam,
            batch=config.devices.batch, directions=self.directions, rounds=config.run.rounds,
            encoding=config.wire.encoding, compression=config.wire.compression,
            next_round=next_round, feedback=method.feedback,
            optimiser=method.client_optimiser, momentum=method.momentum, beta2=method.beta2,
            asynchronous=self.asynchronous,
        )  # fmt: skip
