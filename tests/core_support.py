"""What several test_core files need: a coordinator in hand, and tiny runs in this process."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import experiments
from emulation.inprocess import InProcessFleet
from server_node.actions import Action, CloseRound, Measure, Rules, Work
from server_node.config import Config, load_config
from server_node.coordinator import Coordinator
from server_node.prepare import Experiment
from server_node.run import Run

DIGITS = Path(experiments.__file__).parent / "digits.toml"
TINY = [
    "run.rounds=3",
    "model.name=mlp:64-12-10",
    "devices.count=3",
    "devices.batch=8",
    "method.tau=2",
    "method.directions_client=3",
    "evaluation.every=2",
]
RULES = Rules(
    run_seed=1, rounds=3, participants=3, tau=2, directions=3, quorum=0, deadline_s=0.0,
    rejoin_s=10.0, stall_s=100.0,
)  # fmt: skip


def tiny_config(*overrides: str) -> Config:
    """Three devices, three rounds, an MLP of a thousand weights on the digits."""
    return load_config(DIGITS, [*TINY, *overrides])


def play(
    experiment: Experiment, folder: Path, shuffle: random.Random | None = None, *,
    frozen: bool = False, read_clock_s: Callable[[], float] = time.monotonic,
) -> Run:  # fmt: skip
    """One in-process run of a prepared experiment; its files go to `folder`."""
    folder.mkdir(parents=True)
    return InProcessFleet(experiment._replace(folder=folder), shuffle, read_clock_s).run(
        frozen=frozen
    )


class Desk:
    """A coordinator whose clock is a field, and whose scalars say where they belong."""

    def __init__(self, devices: tuple[int, ...] = (0, 1, 2), **changes: float) -> None:
        self.rules = RULES._replace(**changes)
        self.now_s = 1000.0
        self.machine = Coordinator(self.rules, list(devices), self.now_s)
        self.groups: dict[tuple[int, int, int], int] = {}
        self.actions: list[Action] = []

    def note(self, actions: list[Action]) -> list[Action]:
        """Keep actions for later; returns them."""
        self.actions += actions
        return actions

    def start(self) -> list[Action]:
        return self.note(self.machine.start(self.now_s))

    def activation(self, device: int, number: int | None = None) -> list[Action]:
        number = self.machine.round if number is None else number
        return self.note(self.machine.activation(device, number, self.now_s))

    def differences(
        self, device: int, first_k: int, count: int, number: int | None = None
    ) -> list[Action]:
        number = self.machine.round if number is None else number
        actions = self.machine.differences(device, number, first_k, count, self.now_s)
        if not actions:
            self.groups[number, device, first_k] = count
        return self.note(actions)

    def deliver(self, *devices: int) -> None:
        """All frames of these devices."""
        for device in devices:
            assert self.activation(device) == []
            if self.rules.directions:
                assert self.differences(device, 0, self.rules.directions) == []

    def compute(self, work: Work, poison: float | None = None) -> list[Action]:
        """Do one piece of work; `poison` replaces its first scalar."""
        number = self.machine.round
        if isinstance(work, Measure):
            count = self.groups[number, work.device, work.first_k]
            scalars = [
                client_scalar(number, work.device, k)
                for k in range(work.first_k, work.first_k + count)
            ]
            scalars[0] = scalars[0] if poison is None else poison
            actions = self.machine.measured(work.device, work.first_k, scalars, self.now_s)
        else:
            scalar = server_scalar(number, work.device, work.step)
            scalars = [scalar if poison is None else poison]
            actions = self.machine.stepped(work.device, scalars, self.now_s)
        return self.note(actions)

    def compute_all(self) -> list[Action]:
        """Work until there is none; returns what the machine asked for meanwhile."""
        actions: list[Action] = []
        while (work := self.machine.next_work()) is not None:
            actions += self.compute(work)
        return actions

    def tick(self, later_s: float = 0.0) -> list[Action]:
        self.now_s += later_s
        return self.note(self.machine.tick(self.now_s))

    def left(self, *devices: int) -> list[Action]:
        return [a for d in devices for a in self.note(self.machine.left(d, self.now_s))]

    def joined(self, device: int) -> list[Action]:
        return self.note(self.machine.joined(device, self.now_s))

    @property
    def closed(self) -> list[CloseRound]:
        """All rounds that were closed so far."""
        return [action for action in self.actions if isinstance(action, CloseRound)]


def client_scalar(number: int, device: int, k: int) -> float:
    return 1000.0 * number + 10.0 * device + k


def server_scalar(number: int, device: int, step: int) -> float:
    return -1000.0 * number - 10.0 * device - step
