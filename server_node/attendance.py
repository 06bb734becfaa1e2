"""Which devices are here, which may come back in time, and which have left."""

from __future__ import annotations


class Attendance:
    """Devices by index. One that is away for less than `rejoin_s` is waited for."""

    def __init__(self, devices: list[int], rejoin_s: float) -> None:
        self.present = set(devices)
        self._rejoin_s = rejoin_s
        self._away_since_s: dict[int, float] = {}
        self._returned: set[int] = set()

    def joined(self, device: int) -> bool:
        """A device is here; True when that is progress.

        It is once per round or commit: a device that comes and goes makes none.
        """
        news = device not in self.present and device not in self._returned
        if news:
            self._returned.add(device)
        self.present.add(device)
        self._away_since_s.pop(device, None)
        return news

    def left(self, device: int, now_s: float) -> bool:
        """A device's connection ended; False when it was away already."""
        if device not in self.present:
            return False
        self.present.discard(device)
        self._away_since_s[device] = now_s
        return True

    def expired(self, now_s: float) -> list[int]:
        """Devices that have been away for `rejoin_s`: told once, and waited for no more."""
        over = [d for d, since_s in self._away_since_s.items() if now_s - since_s >= self._rejoin_s]
        for device in over:
            del self._away_since_s[device]
        return over

    def next_round(self) -> None:
        """From now on a return counts again."""
        self._returned.clear()

    def candidates(self) -> list[int]:
        """Devices that are here or waited for, ascending."""
        return sorted(self.present | set(self._away_since_s))

    def wake_times_s(self) -> list[float]:
        """When `expired` will have something to tell."""
        return [since_s + self._rejoin_s for since_s in self._away_since_s.values()]
