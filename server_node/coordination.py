"""What both coordinators have in common: shares of devices that frames complete, and the end.

A coordinator is a state machine without I/O and without a clock. Events in, actions out. It never
sees tensors: frames are named by device and first k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final, Generic, TypeVar

from server_node.actions import Action, Finish, Ignore, Outcome, Rules, Step
from server_node.attendance import Attendance
from server_node.progress import Progress
from server_node.tau import TauController

# Rounds in a row without a contribution that is finite, or contributions in a row that are not,
# before the run is called diverged.
BARREN: Final = 5

ShareT = TypeVar("ShareT", bound=Progress)


class Coordination(ABC, Generic[ShareT]):
    """State of one run. `now_s` is any monotonic clock, the same in all calls."""

    def __init__(self, rules: Rules, devices: list[int], now_s: float) -> None:
        self._rules = rules
        self._attendance = Attendance(devices, rules.rejoin_s)
        self._shares: dict[int, ShareT] = {}
        self._progress_s = now_s
        self._barren = 0
        self.tau = TauController(rules.tau, rules.tau_cap)
        self.round = -1
        self.finished: Finish | None = None

    def activation(self, device: int, round_number: int, now_s: float) -> list[Action]:
        """A device's activation and labels are here."""
        share = self._awaited(device, round_number)
        if isinstance(share, Ignore):
            return [share]
        if share.activation:
            return [Ignore(device, "duplicate")]
        share.activation = True
        self._arrived(device, share, now_s)
        return []

    def differences(
        self, device: int, round_number: int, first_k: int, count: int, now_s: float
    ) -> list[Action]:
        """A group of a device's differences is here."""
        share = self._awaited(device, round_number)
        if isinstance(share, Ignore):
            return [share]
        why = share.take_group(first_k, count, self._rules.directions)
        if why:
            return [Ignore(device, why)]
        self._arrived(device, share, now_s)
        return []

    def poisoned(
        self, device: int, round_number: int, now_s: float, *, activation: bool
    ) -> list[Action]:
        """A device's tensor is here, with values that are not finite: its share is none."""
        share = self._awaited(device, round_number)
        if isinstance(share, Ignore):
            return [share]
        if (activation and share.activation) or share.has_frames(self._rules):
            return [Ignore(device, "duplicate")]
        self._progress_s = now_s
        return self._poisoned(device, now_s)

    def step_took(self, seconds: float) -> None:
        """The server steps that are told of next took so long, computed at once."""
        self.tau.step_took(seconds)

    def is_last(self, step: Step) -> bool:
        """True when a device has all its steps after this one; what is planned later adds some."""
        planned = step.step > 0 or not self.tau.adaptive
        return planned and step.step + 1 == self._shares[step.device].tau

    @abstractmethod
    def _awaited(self, device: int, round_number: int) -> ShareT | Ignore:
        """The share that a frame of this round is for, or why there is none."""

    @abstractmethod
    def _poisoned(self, device: int, now_s: float) -> list[Action]:
        """Drop a share of which a tensor is not finite."""

    @abstractmethod
    def _arrived(self, device: int, share: ShareT, now_s: float) -> None:
        """A frame was added to the share."""

    def _stalled(self, what: str, missing: list[int]) -> list[Action]:
        awaited = f"devices {missing}" if missing else "a device to come back"
        text = f"{what} {self.round} waited {self._rules.stall_s:.0f} s for {awaited}"
        return self._finish(Outcome.STALLED, text)

    def _finish(self, outcome: Outcome, detail: str) -> list[Action]:
        self.finished = Finish(outcome, detail)
        return [self.finished]
