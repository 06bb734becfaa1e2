"""First order: a class of torch.optim by name, and its state as one flat vector.

The state of all parameters in one vector (n,) float32 can be copied, averaged over devices, hashed
and kept like weights. An optimiser whose state is anything but float32 tensors is refused.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from server_node.errors import ConfigError

Option = float | bool | list[float]

Vector = NDArray[np.float32]

# Tried before anything is exported: weights of a matrix and of a vector.
_TRIAL_SHAPES: Final = ((3, 2), (3,))


class OptimiserRule(NamedTuple):
    """A class of torch.optim and its arguments beside the step size."""

    name: str
    options: dict[str, Option]


class _Slot(NamedTuple):
    """One tensor of the state: `key` of parameter number `parameter`."""

    parameter: int
    key: str
    shape: torch.Size
    device: torch.device


def build_optimiser(rule: OptimiserRule, parameters: Sequence[nn.Parameter]) -> Any:
    """The optimiser; its step size is set every round. Raises ConfigError."""
    found: Any = getattr(torch.optim, rule.name, None)
    known = inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)
    if not known:
        raise ConfigError(
            f"method.server_optimiser: torch.optim has no {rule.name!r}; use a class of it such as "
            "SGD, Adam or AdamW"
        )
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in rule.options.items()
    }
    try:
        return found(parameters, lr=1e-3, **options)
    except Exception as cause:  # whatever an optimiser says of its arguments
        raise ConfigError(
            f"method.server_options: torch.optim.{rule.name} refuses them ({_line(cause)})"
        ) from cause


def check_optimiser(rule: OptimiserRule) -> None:
    """Raise ConfigError unless the optimiser exists, takes its options and has a flat state."""
    trial = [nn.Parameter(torch.ones(shape)) for shape in _TRIAL_SHAPES]
    OptimiserState(rule, build_optimiser(rule, trial), trial)


class OptimiserState:
    """The state of an optimiser as a vector; empty before its first step ever."""

    def __init__(
        self, rule: OptimiserRule, optimiser: Any, parameters: Sequence[nn.Parameter]
    ) -> None:
        """Try one step to see what the state is made of; the parameters keep their values."""
        self._optimiser, self._parameters = optimiser, parameters
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        try:
            optimiser.step()
            self._slots = [
                _Slot(index, key, value.shape, value.device)
                for index, parameter in enumerate(parameters)
                for key, value in sorted(optimiser.state[parameter].items())
                if value is not None and _is_flat(value)
            ]
        except Exception as cause:
            raise ConfigError(
                f"method.server_optimiser: torch.optim.{rule.name} cannot step this server half "
                f"({_line(cause)})"
            ) from cause
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
                    parameter.grad = None
            optimiser.state.clear()
        self.size = sum(math.prod(slot.shape) for slot in self._slots)

    def write(self, flat: torch.Tensor) -> None:
        """Make the state that of `flat` (n,), or that before the first step when it is empty."""
        self._optimiser.state.clear()
        offset = 0
        for slot in self._slots if len(flat) else ():
            count = math.prod(slot.shape)
            value = flat[offset : offset + count].to(slot.device, copy=True).reshape(slot.shape)
            self._optimiser.state[self._parameters[slot.parameter]][slot.key] = value
            offset += count

    def read(self, flat: torch.Tensor) -> None:
        """Copy the state into `flat` (n,)."""
        offset = 0
        for slot in self._slots:
            count = math.prod(slot.shape)
            value = self._optimiser.state[self._parameters[slot.parameter]].get(slot.key)
            part = flat[offset : offset + count]
            if value is None:  # a parameter that got no gradient
                part.zero_()
            else:
                part.copy_(value.detach().reshape(-1))
            offset += count


def _is_flat(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        raise TypeError("its state is not made of float32 tensors, which can be averaged")
    return True


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
