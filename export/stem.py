"""A data-driven stem for the device half, and a linear head: the zoo's `stem:D`.

Patches of 6x6 at stride 2, each divided by its own contrast, meet F filters; both signs of the
response beyond a threshold are kept, averaged over 3x3, projected to D features and clamped. After
Coates, Lee & Ng, "An analysis of single-layer networks in unsupervised feature learning" (AISTATS
2011). The filters come from whitened patches of public images or from random directions, the
projection from second moments summed over devices (export/stem_fit.py). Unfitted, both are random.
The head starts at zero.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Final, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from export.errors import ModelError

PATCH: Final = 6
STRIDE: Final = 2
# Added to a patch's variance; images are standardised.
CONTRAST: Final = 0.1
THRESHOLD: Final = 0.25
POOL: Final = 3
CLAMP: Final = 4.0
DEFAULT_FILTERS: Final = 64
DEFAULT_CLASSES: Final = 10
CUT_PATCHES: Final = "patches"

FILTERS_WEIGHT: Final = "patches.filters.weight"
FILTERS_BIAS: Final = "patches.filters.bias"
PROJECTION_WEIGHT: Final = "whiten.project.weight"
PROJECTION_BIAS: Final = "whiten.project.bias"
HEAD: Final = "fc"

_NAME: Final = re.compile(r"stem:(\d{1,5})((?::[fn]\d{1,5})*)", re.ASCII)


class StemOptions(NamedTuple):
    """What a name says: stem:D[:fFILTERS][:nCLASSES]."""

    features: int
    filters: int
    classes: int


class Patches(nn.Module):
    """Contrast-normalised convolution, both signs beyond a threshold, averaged.

    Maps x (batch, channels, height, width) to (batch, 2 F, rows, columns).
    """

    def __init__(self, channels: int, filters: int, pool: int) -> None:
        super().__init__()
        self.filters = nn.Conv2d(channels, filters, PATCH, STRIDE)
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The maps. Filters that sum to zero need no mean taken from the patch."""
        mean = functional.avg_pool2d(x.mean(1, keepdim=True), PATCH, STRIDE)
        squares = functional.avg_pool2d((x * x).mean(1, keepdim=True), PATCH, STRIDE)
        contrast = torch.sqrt((squares - mean * mean).clamp(min=0.0) + CONTRAST)
        bias = self.filters.bias
        assert bias is not None
        # The bias comes after the division: what is divided is the convolution without it.
        bias = bias[:, None, None]
        response = (self.filters(x) - bias) / contrast + bias
        both = torch.cat(
            (torch.relu(response - THRESHOLD), torch.relu(-response - THRESHOLD)), dim=1
        )
        return functional.avg_pool2d(both, self.pool)


def parse_stem(name: str) -> StemOptions:
    """The options in a stem's name. Raises ModelError."""
    match = _NAME.fullmatch(name)
    given = [part for part in match[2].split(":") if part] if match else []
    values = {part[0]: int(part[1:]) for part in given}
    options = StemOptions(
        int(match[1]) if match else 0, values.get("f", DEFAULT_FILTERS),
        values.get("n", DEFAULT_CLASSES),
    )  # fmt: skip
    if min(options) < 1 or options.classes < 2 or len(values) < len(given):
        raise ModelError(
            f"model {name!r}: write stem:D, the number of features, and if need be fN, the "
            f"filters ({DEFAULT_FILTERS}), and nN, the classes ({DEFAULT_CLASSES}), as in "
            "stem:256:f64:n10"
        )
    return options


def build_stem(name: str, image: tuple[int, int, int]) -> nn.Module:
    """The model for images (channels, height, width). Raises ModelError."""
    options = parse_stem(name)
    channels, height, width = image
    if min(height, width) < PATCH:
        raise ModelError(f"model {name!r}: images of {height}x{width} are smaller than a patch")
    sides = [(side - PATCH) // STRIDE + 1 for side in (height, width)]
    pool = min(POOL, *sides)
    maps = 2 * options.filters * (sides[0] // pool) * (sides[1] // pool)
    if options.features > maps:
        raise ModelError(
            f"model {name!r}: {options.filters} filters make only {maps} numbers of an image, "
            f"fewer than {options.features}"
        )
    head = nn.Linear(options.features, options.classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    whiten = OrderedDict[str, nn.Module](
        flatten=nn.Flatten(), project=nn.Linear(maps, options.features),
        clamp=nn.Hardtanh(-CLAMP, CLAMP),
    )  # fmt: skip
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            [
                (CUT_PATCHES, Patches(channels, options.filters, pool)),
                ("whiten", nn.Sequential(whiten)),
                (HEAD, head),
            ]
        )
    )
