"""Groups of a device's differences as they come in: which belong to its round, and which do not."""

from __future__ import annotations


def refusal(received: dict[int, int], first_k: int, count: int, directions: int) -> str:
    """Why directions first_k.. (`count` of them) are not taken; empty when they are.

    `received` maps the first k of the groups that are here to their directions; K is `directions`.
    """
    if first_k in received:
        return "duplicate"
    overlap = any(first_k < k + n and k < first_k + count for k, n in received.items())
    return "directions out of range" if overlap or first_k + count > directions else ""
