"""What goes into the coordinator and what comes out of it: rules, actions, work."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Rules(NamedTuple):
    """What the coordinator needs of the configuration; times in seconds."""

    run_seed: int
    rounds: int
    participants: int
    tau: int
    directions: int  # K; 0 when the client half is frozen
    quorum: int
    deadline_s: float  # 0: none
    rejoin_s: float
    stall_s: float
    replicas: int = 1  # steps of as many devices may be computed at once
    tau_cap: int = 0  # above tau: tau fills the measured slack, up to so many steps
    staleness_limit: int = 0  # asynchronous: older contributions are dropped
    cut_gradient: bool = False  # devices learn from dL/dh, and send no differences
    pooled: bool = False  # the steps of a round are computed once, on the frames of all
    first_order: bool = False  # a device's steps are computed in one go: its copy is not rebuilt


# -- actions: what the driver must do, in order


class OpenRound(NamedTuple):
    """Announce a round to its participants (indices, ascending)."""

    round: int
    participants: list[int]


class OpenShare(NamedTuple):
    """Asynchronous: tell one device to begin; its batch and directions are those of `round`."""

    device: int
    round: int


class Remind(NamedTuple):
    """Tell one device (again) of the open round that still misses frames of it."""

    device: int
    round: int
    participants: list[int]


class Reply(NamedTuple):
    """Send a device its K scalars: its round is complete."""

    device: int
    round: int
    scalars: list[float]


class SendGradient(NamedTuple):
    """Send a device dL/dh of its activation at the stepped copy, which the half still holds."""

    device: int
    round: int


class Contribution(NamedTuple):
    """One device's complete share of a round."""

    device: int
    client_scalars: list[float]  # (K,)
    server_scalars: list[list[float]]  # (tau, K_s)
    staleness: int = 0  # commits that were made since its weights


class CloseRound(NamedTuple):
    """Commit a round; contributions by ascending device, `dropped` says why others are missing.

    `stepped` (ascending) are those whose server steps count, None: the contributors'. Of a pooled
    round it is the leader; in first order also who was dropped after the steps. `staleness` is that
    of steps which are committed without a contribution (asynchronous).
    """

    round: int
    contributions: list[Contribution]
    dropped: dict[int, str]
    opened_s: float
    stepped: list[int] | None = None
    staleness: int = 0


class Ignore(NamedTuple):
    """A frame that changes nothing, and why."""

    device: int
    why: str


class Outcome(Enum):
    """How a run ended."""

    COMPLETE = "complete"
    STALLED = "stalled"
    DIVERGED = "diverged"


class Finish(NamedTuple):
    """The run is over."""

    outcome: Outcome
    detail: str


Action = OpenRound | OpenShare | Remind | Reply | SendGradient | CloseRound | Ignore | Finish

# -- work: what the driver should compute next, one piece at a time


class Step(NamedTuple):
    """Server step `step` of tau for a device, in its slot of `replicas`.

    Pooled: for the leader, the lowest device of the pool.
    """

    device: int
    step: int
    slot: int = 0


class Measure(NamedTuple):
    """Loss differences of a device's directions from `first_k` on."""

    device: int
    first_k: int


Work = Step | Measure
