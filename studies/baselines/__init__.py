"""Baselines by name, in the harness of the method; docs/baselines.md tells what each is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from studies.baselines.fedavg import FedAvgOptions, fedavg
from studies.baselines.first_order_client import (
    FirstOrderClientOptions,
    FrozenClientOptions,
    first_order_client,
    frozen_client,
)
from studies.baselines.gas import GasOptions, gas
from studies.baselines.options import Options
from studies.baselines.splitfed import SplitFedOptions, splitfed_v1, splitfed_v2
from studies.errors import StudyError
from studies.harness import Bench, Point


class Baseline(NamedTuple):
    """A baseline and the type of its options."""

    run: Callable[[Bench, Any], list[Point]]
    options: type[Options]


BASELINES: Final[dict[str, Baseline]] = {
    "splitfed_v1": Baseline(splitfed_v1, SplitFedOptions),
    "splitfed_v2": Baseline(splitfed_v2, SplitFedOptions),
    "gas": Baseline(gas, GasOptions),
    "fedavg": Baseline(fedavg, FedAvgOptions),
    "first_order_client": Baseline(first_order_client, FirstOrderClientOptions),
    "frozen_client": Baseline(frozen_client, FrozenClientOptions),
}


def run_baseline(name: str, bench: Bench, options: Mapping[str, Any]) -> list[Point]:
    """The points of evaluated rounds; the last is that in which a run diverged, if it did.

    Raises StudyError for a name or an option that does not exist, or a value that does not fit.
    """
    if name not in BASELINES:
        raise StudyError(f"baseline {name!r}: use one of {', '.join(sorted(BASELINES))}")
    baseline = BASELINES[name]
    try:
        checked = msgspec.convert(dict(options), baseline.options)
    except msgspec.ValidationError as error:
        raise StudyError(f"options of baseline {name}: {error}; see docs/baselines.md") from error
    return baseline.run(bench, checked)
