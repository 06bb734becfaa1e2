"""When a synchronous round ends: devices in parallel, a server that serves one or all at once."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Timing(Protocol):
    """Seconds of devices and links in round `number`; emulation.delays.Delays is one."""

    def for_forwards(
        self, device: int, number: int, forwards: float, *, begun: bool = False
    ) -> float:
        """So many forwards of the device half on one batch, or work worth as many.

        `begun`: not the first of a round, for which nothing has to be fetched or waited for.
        """
        ...

    def up_s(self, device: int, size_bytes: int) -> float:
        """A message from the device to the server."""
        ...

    def down_s(self, device: int, size_bytes: int) -> float:
        """A message from the server to the device."""
        ...

    @property
    def server_step_s(self) -> float:
        """A step of the server half on the batch of one device."""
        ...


class Instant:
    """Nothing takes time."""

    server_step_s = 0.0

    def for_forwards(
        self, device: int, number: int, forwards: float, *, begun: bool = False  # noqa: ARG002
    ) -> float:  # fmt: skip
        """No time."""
        return 0.0

    def up_s(self, device: int, size_bytes: int) -> float:  # noqa: ARG002
        """No time."""
        return 0.0

    def down_s(self, device: int, size_bytes: int) -> float:  # noqa: ARG002
        """No time."""
        return 0.0


class Leg(NamedTuple):
    """One batch of a device: what passes before and after the server's step on it, in seconds."""

    before_s: float
    after_s: float


class Trip(NamedTuple):
    """A device's round: begin (weights down), its batches, end (weights up), in seconds."""

    begin_s: float
    legs: list[Leg]
    end_s: float


def parallel_s(trips: Sequence[Trip], step_s: float) -> float:
    """Until the last device is through; the server works on all batches at once."""
    return max(
        trip.begin_s + trip.end_s + sum(leg.before_s + step_s + leg.after_s for leg in trip.legs)
        for trip in trips
    )


def serial_s(trips: Sequence[Trip], step_s: float) -> float:
    """The same with a server that works on one batch at a time, in the order of arrival."""
    waiting = [(trip.begin_s + trip.legs[0].before_s, place, 0) for place, trip in enumerate(trips)]
    heapq.heapify(waiting)
    free_s = end_s = 0.0
    while waiting:
        arrival_s, place, leg = heapq.heappop(waiting)
        trip = trips[place]
        free_s = max(free_s, arrival_s) + step_s
        back_s = free_s + trip.legs[leg].after_s
        if leg + 1 < len(trip.legs):
            heapq.heappush(waiting, (back_s + trip.legs[leg + 1].before_s, place, leg + 1))
        else:
            end_s = max(end_s, back_s + trip.end_s)
    return end_s


def in_turn_s(trips: Sequence[Trip], step_s: float) -> float:
    """The same with a server that takes all batches of one device before the next device's."""
    free_s = end_s = 0.0
    for trip in trips:
        ready_s = trip.begin_s
        for leg in trip.legs:
            free_s = max(free_s, ready_s + leg.before_s) + step_s
            ready_s = free_s + leg.after_s
        end_s = max(end_s, ready_s + trip.end_s)
    return end_s
