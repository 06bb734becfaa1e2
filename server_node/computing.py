"""The server's work: pieces that the coordinator asks for, computed and accounted for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from server_node.actions import Action, Measure, Step, Work
from server_node.asynchronous import AsynchronousCoordinator
from server_node.coordinator import Coordinator
from server_node.halves import Halves
from server_node.ledger import Ledger

AnyCoordinator = Coordinator | AsynchronousCoordinator


class Computing:
    """Computes what a coordinator wants next; returns the actions that follow, None without work.

    `spend` lets the time of a virtual clock pass that pieces take; then `min_step_s`, how long a
    step takes at least, is not waited for.
    """

    def __init__(
        self, halves: Halves, ledger: Ledger, min_step_s: float,
        read_clock_s: Callable[[], float], spend: Callable[[Sequence[Work]], None] | None,
    ) -> None:  # fmt: skip
        self._halves, self._bench, self._ledger = halves, halves.bench, ledger
        self._min_step_s, self._read_clock_s, self._spend = min_step_s, read_clock_s, spend

    def one(self, coordinator: AnyCoordinator) -> list[Action] | None:
        """One piece, or a batch of steps."""
        work = coordinator.next_work()
        if work is None:
            return None
        pieces: Sequence[Work] = coordinator.batch(work) if isinstance(work, Step) else [work]
        waiting, number, begin_s = coordinator.waiting, coordinator.round, self._read_clock_s()
        if self._spend is not None:
            self._spend(pieces)
        actions = self._compute(pieces, coordinator, begin_s)
        seconds = self._read_clock_s() - begin_s
        self._ledger.worked(pieces, number, begin_s, seconds, waiting=waiting)
        return actions

    def together(self, coordinator: AnyCoordinator) -> list[Action] | None:
        """A piece of every device that has one, in the time of the longest.

        For a virtual clock: one server that works for all that wait; who comes meanwhile waits.
        """
        pieces = coordinator.all_work()
        if not pieces or self._spend is None:
            return None
        waiting, number, begin_s = coordinator.waiting, coordinator.round, self._read_clock_s()
        self._spend(pieces)
        seconds = self._read_clock_s() - begin_s
        self._ledger.worked(pieces, number, begin_s, seconds, waiting=waiting)
        return self._compute(pieces, coordinator, begin_s)

    def _compute(
        self, pieces: Sequence[Work], coordinator: AnyCoordinator, begin_s: float
    ) -> list[Action]:
        actions: list[Action] = []
        for group in _by_slots([piece for piece in pieces if isinstance(piece, Step)]):
            actions += self._step(group, coordinator, begin_s)
        for piece in pieces:
            if isinstance(piece, Measure):
                scalars = self._bench.measure(piece, coordinator.pool)
                now_s = self._read_clock_s()
                actions += coordinator.measured(piece.device, piece.first_k, scalars, now_s)
        return actions

    def _step(self, steps: list[Step], coordinator: AnyCoordinator, begin_s: float) -> list[Action]:
        if isinstance(coordinator, AsynchronousCoordinator) and not steps[0].step:
            # Its directions are those of its version; the size is that of the commit it becomes.
            version = coordinator.version(steps[0].device)
            self._halves.start_round(version, coordinator.round)
        rows = self._bench.step(
            steps, coordinator.round, coordinator.pool, last=coordinator.is_last(steps[0])
        )
        pad_s = self._min_step_s - (self._read_clock_s() - begin_s)
        if pad_s > 0 and self._spend is None:
            time.sleep(pad_s)
        coordinator.step_took(self._read_clock_s() - begin_s)
        actions: list[Action] = []
        for step, scalars in zip(steps, rows, strict=True):
            # Only the last can close the round: those behind it are not complete.
            actions += coordinator.stepped(step.device, scalars, self._read_clock_s())
        return actions


def _by_slots(steps: list[Step]) -> list[list[Step]]:
    """The steps in as few groups as possible, none with two of a slot."""
    groups: list[dict[int, Step]] = []
    for step in steps:
        free = next((group for group in groups if step.slot not in group), None)
        if free is None:
            groups.append(free := {})
        free[step.slot] = step
    return [list(group.values()) for group in groups]
