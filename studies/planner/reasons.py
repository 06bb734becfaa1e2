"""Why: the plan in plain sentences, from the same figures that it was made with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Final

from studies.planner.choice import Choice, Probe
from studies.planner.options import Excluded, Options
from studies.planner.search import Found

# Slowest over median device from which a tau of its own pays for each.
_UNEVEN: Final = 2.0


def reasons(options: Options, best: Choice, found: list[Found]) -> list[str]:
    """Sentences on cut, tau, K, encoding, what is perturbed, and uneven devices."""
    return [
        _where_time_goes(options, best),
        *_other(options, best, found, "cut", lambda probe: probe.cut),
        *_other(options, best, found, "tau", lambda probe: probe.tau),
        *_other(options, best, found, "K", lambda probe: probe.directions_client),
        *_other(options, best, found, "K_s", lambda probe: probe.directions_server),
        _encoding(options, best),
        _perturbed(options, best),
        *_uneven(options, best),
    ]


def excluded_lines(options: Options) -> list[str]:
    """One line for each cut and encoding of which something is forbidden, with the first limit."""
    search = options.fleet.search
    groups: dict[tuple[str, str], list[Excluded]] = {}
    for one in options.excluded:
        groups.setdefault((one.cut, one.encoding), []).append(one)
    lines: list[str] = []
    for (cut, encoding), group in groups.items():
        sizes = sorted({one.directions_client for one in group})
        first = next(one for one in group if one.directions_client == sizes[0])
        every = len(sizes) == len(set(search.directions_client))
        some = "" if every else f" with K {', '.join(map(str, sizes))}"
        lines.append(f"cut {cut} in {encoding}{some}: {first.limit}")
    return lines


def _where_time_goes(options: Options, best: Choice) -> str:
    parts = options.parts(best)
    server = "the server steps meanwhile and adds nothing"
    if parts.server_s > 0.01 * parts.round_s:
        server = f"the server adds {seconds(parts.server_s)}"
    return (
        f"A round takes {seconds(parts.round_s)}: {seconds(parts.device_s)} until the slowest "
        f"participant has computed, {seconds(parts.up_s)} more for its link; {server} (busy for "
        f"{seconds(parts.server_busy_s)})."
    )


def _other(
    options: Options, best: Choice, found: list[Found], name: str, field: Callable[[Probe], object]
) -> Iterable[str]:
    """How the best measured setting with another value of one field compares."""
    mine = field(best.probe)
    if len(_searched(options, name)) == 1:
        return
    if len({field(probe) for probe in options.choices}) == 1:
        yield f"{name} {mine}: limits forbid every other."
        return
    others = [one for one in found if field(one.probe) != mine and not one.diverged]
    if not others:
        yield f"{name} {mine}: no other was measured that did not diverge."
        return
    other = min(others, key=lambda one: _at_least_s(options, one))
    own = next(one.rounds for one in found if one.probe == best.probe)
    went = "needs" if other.rounds is not None else "had not reached the target after"
    yield (
        f"{name} {mine}: {own} rounds of {seconds(options.round_s[best.probe])}; the best measured "
        f"with another, {other.probe}, {went} {other.rounds or other.limit} of "
        f"{seconds(options.round_s[other.probe])}."
    )


def _at_least_s(options: Options, one: Found) -> tuple[bool, float]:
    """Those that reached the target first, by time."""
    return one.rounds is None, (one.rounds or one.limit) * options.round_s[one.probe]


def _searched(options: Options, name: str) -> list[object]:
    search = options.fleet.search
    lists: dict[str, list[object]] = {
        "cut": list(options.cuts), "tau": list(search.tau), "K": list(search.directions_client),
        "K_s": list(search.directions_server),
    }  # fmt: skip
    return lists[name]


def _encoding(options: Options, best: Choice) -> str:
    mine = options.sent(best).up
    for encoding in options.fleet.search.encoding:
        other = best._replace(encoding=encoding)
        if encoding == best.encoding:
            continue
        text = f"{best.encoding}: {kilobytes(mine)} up a round and participant"
        if options.forbidden(other):
            return f"{text}; a limit forbids {encoding}."
        other_s, their = options.seconds(other), options.sent(other).up
        return f"{text}; {encoding}, {kilobytes(their)}, would make it {seconds(other_s)}."
    return f"{best.encoding}: {kilobytes(mine)} up a round and participant; no other was allowed."


def _perturbed(options: Options, best: Choice) -> str:
    what = " ".join(best.probe.perturb) or "all its weights"
    cut = options.cuts[best.probe.cut]
    alone = "; nothing else was in search.perturb" if len(options.fleet.search.perturb) == 1 else ""
    return f"The device perturbs {what} ({cut.d_c:,} on the device, {cut.d_s:,} kept){alone}."


def _uneven(options: Options, best: Choice) -> Iterable[str]:
    cut, probe = options.cuts[best.probe.cut], best.probe
    means = options.means_s(cut, probe.directions_client)
    ratio = max(means) / max(statistics.median(means), 1e-12)
    if ratio >= _UNEVEN:
        yield (
            f"The slowest device takes {ratio:.1f} times as long as the median one: "
            'method.tau_mode = "adaptive" would fill the waiting of the others with server steps. '
            "That is not part of what was measured here."
        )


def seconds(value: float) -> str:
    """Three digits, with the unit."""
    return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def kilobytes(value: int) -> str:
    """With the unit."""
    return f"{value / 1000:.1f} kB"
