"""How far a device's share of the work is: the frames that are here, what was computed on them."""

from __future__ import annotations

from dataclasses import dataclass, field

from server_node.actions import Rules


@dataclass(kw_only=True)
class Progress:
    """One device's open share; both coordinators add what is theirs."""

    tau: int
    activation: bool = False
    received: dict[int, int] = field(default_factory=dict)  # first k -> directions of the group
    unmeasured: set[int] = field(default_factory=set)  # first k of groups without scalars yet
    server_scalars: list[list[float]] = field(default_factory=list)
    client_scalars: dict[int, float] = field(default_factory=dict)
    asked: bool = False  # was sent the cut gradient

    def take_group(self, first_k: int, count: int, directions: int) -> str:
        """Take `count` of K = `directions` differences from first_k on, or say why not."""
        if first_k in self.received:
            return "duplicate"
        overlap = any(first_k < k + n and k < first_k + count for k, n in self.received.items())
        if overlap or first_k + count > directions:
            return "directions out of range"
        self.received[first_k] = count
        self.unmeasured.add(first_k)
        return ""

    def take_scalars(self, first_k: int, scalars: list[float]) -> None:
        """Note the loss differences of a group."""
        self.unmeasured.discard(first_k)
        self.client_scalars.update(enumerate(scalars, first_k))

    def has_frames(self, rules: Rules) -> bool:
        """Whether the activation and all differences are here."""
        return self.activation and sum(self.received.values()) == rules.directions

    @property
    def client_scalars_in_order(self) -> list[float]:
        """By ascending k."""
        return [self.client_scalars[k] for k in sorted(self.client_scalars)]
