"""Options of baselines: frozen structs, unknown keys refused; torch optimisers by name."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any, Final, Literal

import torch
from msgspec import Struct

from studies.errors import StudyError
from studies.harness import TorchHalf

# Their step() wants more than gradients.
_UNFIT: Final = ("LBFGS", "Optimizer", "SparseAdam")

OptimiserOptions = dict[str, bool | float | list[float]]
# An average weighs a device by its samples (n_k / n), or all alike as our method does.
Weighting = Literal["samples", "uniform"]


class Options(Struct, frozen=True, forbid_unknown_fields=True):
    """Options of one baseline."""


class Stepper:
    """A torch optimiser on one half; each owner (a device) has its own state of it."""

    def __init__(
        self,
        half: TorchHalf,
        name: str,
        options: OptimiserOptions,
        eta: float,
        clip_norm: float = 0,
    ) -> None:
        """`name` is a class of torch.optim; `clip_norm` 0 leaves gradients alone.

        Raises StudyError.
        """
        made: Any = getattr(torch.optim, name, None)
        if name in _UNFIT or not _is_optimiser(made):
            raise StudyError(f"optimiser {name!r}: use a class of torch.optim, e.g. SGD or Adam")
        self._half, self._eta, self._clip_norm = half, eta, clip_norm
        self._optimiser: torch.optim.Optimizer | None = None
        self._initial: dict[Any, Any] = {}
        self._states: dict[int, Any] = {}
        self._owner = -1
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        try:
            if half.parameters:
                self._optimiser = made(half.parameters, lr=eta, **given)
        except (TypeError, ValueError) as error:
            raise StudyError(f"optimiser {name} with {options}: {error}") from error
        if self._optimiser is not None:
            self._initial = {p: copy.deepcopy(s) for p, s in self._optimiser.state.items()}

    def step(self, factor: float, owner: int = -1) -> None:
        """Step by the gradients in the half, eta times `factor`, with the owner's state."""
        if self._optimiser is None:  # a half without parameters
            return
        if owner != self._owner:
            self._states[self._owner] = self._optimiser.state
            self._optimiser.state = self._states.pop(owner, None) or self._fresh()
            self._owner = owner
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self._half.parameters, self._clip_norm)
        for group in self._optimiser.param_groups:
            group["lr"] = self._eta * factor
        self._optimiser.step()

    def forget(self, owner: int) -> None:
        """Drop an owner's state."""
        if owner == self._owner and self._optimiser is not None:
            self._optimiser.state = self._fresh()
        self._states.pop(owner, None)

    def _fresh(self) -> defaultdict[Any, Any]:
        """A state as the optimiser begins with; some begin with more than nothing."""
        return defaultdict(dict, {p: copy.deepcopy(state) for p, state in self._initial.items()})


def _is_optimiser(made: object) -> bool:
    return isinstance(made, type) and issubclass(made, torch.optim.Optimizer)
