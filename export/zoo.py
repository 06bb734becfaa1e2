"""The zoo: models by name. Weights are torch's defaults, from the generator's present state.

mlp:64-32-32-10    widths, input first, classes last; ReLU between
conv:4-32-10       filters of one 3x3 convolution, then widths, classes last
lenet              LeNet-5 for 28x28 (LeCun et al. 1998)
alexnet            the AlexNet for 32x32 of GAS (AAAI 2025): 3,868,746 parameters; takes 28x28 too
alexnet-white      the same, started from whitening filters and orthogonal layers (export/start.py)
resnet18           ResNet-18 (arXiv 1512.03385) with a 3x3 stem and GroupNorm
resnet18-bn        the same with BatchNorm, whose statistics are frozen
mobilenetv2        MobileNetV2 (arXiv 1801.04381) for small images, with GroupNorm
mobilenetv2-bn     the same with frozen BatchNorm
stem:256           patches, whitening to so many features, linear head (export/stem.py)

All but mlp, conv and stem take options after colons, in any order: a number is the classes (10),
cN the channels of the image (3; lenet 1), wN the width of the first layer (alexnet and mobilenetv2
32, resnet18 64; the others follow in proportion): alexnet:100, resnet18:10:c1:w16.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Final, NamedTuple

from torch import Tensor, nn

from export.errors import ModelError
from export.start import start_white
from export.stem import build_stem

NAMES: Final = (
    "mlp:64-32-32-10, conv:4-32-10, lenet, alexnet, alexnet-white, resnet18, resnet18-bn, "
    "mobilenetv2, mobilenetv2-bn, stem:256"
)
_SIDE: Final = 32
# Width of a group of GroupNorm; narrow layers make one group of all their channels.
_GROUP: Final = 8
# MobileNetV2, table 2: expansion, channels, repeats, stride. The first two strides are 1 for
# images of 32x32.
_INVERTED: Final = (
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip
_LAST_CHANNELS: Final = 1280

Shape = tuple[int, ...]
Norm = Callable[[int], nn.Module]


class Options(NamedTuple):
    """What stands after a model's name."""

    classes: int
    channels: int
    width: int


def build_zoo(name: str, sample: Shape | None) -> tuple[nn.Module, Shape]:
    """A model and the shape it takes; `sample` is the data's, if known. Raises ModelError."""
    kind, _, argument = name.partition(":")
    if kind == "mlp":
        return _mlp(name, argument, sample)
    if kind == "conv":
        return _small_conv(name, argument, sample)
    if kind == "lenet":
        options = _options(name, argument, channels=1, width=6)
        return _lenet(options), (options.channels, 28, 28)
    if kind in ("alexnet", "alexnet-white"):
        options = _options(name, argument, channels=3, width=32)
        model = _alexnet(options)
        return (start_white(model) if kind.endswith("-white") else model), _image(
            name, options, sample
        )
    if kind == "stem":
        image = _any_image(name, sample)
        return build_stem(name, image), image
    makers = {"resnet18": _resnet18, "mobilenetv2": _mobilenetv2}
    maker = makers.get(kind.removesuffix("-bn"))
    if maker is None:
        raise ModelError(f"model {name!r} is unknown: use {NAMES}, or path/to/file.py:factory")
    options = _options(name, argument, channels=3, width=64 if maker is _resnet18 else 32)
    norm: Norm = nn.BatchNorm2d if kind.endswith("-bn") else _group_norm
    return maker(options, norm), _image(name, options, sample)


def _options(name: str, argument: str, *, channels: int, width: int) -> Options:
    options = Options(10, channels, width)
    for part in argument.split(":") if argument else ():
        match = re.fullmatch(r"(c|w|)(\d{1,6})", part, re.ASCII)
        field = {"": "classes", "c": "channels", "w": "width"}[match[1]] if match else ""
        if match is None or int(match[2]) < (2 if field == "classes" else 1):
            raise ModelError(
                f"model {name!r}: {part!r} is no option: a number from 2 is the classes, cN the "
                "channels, wN the width, as in alexnet:10:c1:w16"
            )
        options = options._replace(**{field: int(match[2])})
    return options


def _image(name: str, options: Options, sample: Shape | None) -> Shape:
    """(channels, height, width) as the data has it, 32x32 without data."""
    if sample is None:
        return options.channels, _SIDE, _SIDE
    shape = (1, *sample) if len(sample) == 2 else sample
    if len(shape) != 3:
        raise ModelError(f"model {name!r} takes images, a sample of the data has shape {sample}")
    if shape[0] != options.channels:
        raise ModelError(
            f"model {name!r} takes {options.channels} channels, a sample of the data has shape "
            f"{sample}, channels first: use {name.partition(':')[0]}:{options.classes}:c{shape[0]}"
        )
    return shape


def _any_image(name: str, sample: Shape | None) -> tuple[int, int, int]:
    """(channels, height, width) as the data has it, 1x28x28 without data; 64 numbers are 1x8x8."""
    shape = sample or (1, 28, 28)
    if len(shape) == 1 and math.isqrt(shape[0]) ** 2 == shape[0]:
        shape = (math.isqrt(shape[0]),) * 2
    shape = (1, *shape) if len(shape) == 2 else shape
    if len(shape) != 3:
        raise ModelError(f"model {name!r} takes images, a sample of the data has shape {sample}")
    return shape


def _widths(name: str, argument: str, example: str) -> list[int]:
    try:
        return [int(width) for width in argument.split("-")]
    except ValueError as error:
        raise ModelError(f"model {name!r}: write the widths as in {example}") from error


def _mlp(name: str, argument: str, sample: Shape | None) -> tuple[nn.Module, Shape]:
    widths = _widths(name, argument, "mlp:64-32-32-10")
    if sample is not None and math.prod(sample) != widths[0]:
        fitting = "-".join(map(str, [math.prod(sample), *widths[1:]]))
        raise ModelError(
            f"model {name!r}: takes {widths[0]} inputs, a sample of the data has "
            f"{math.prod(sample)}: use mlp:{fitting}"
        )
    if len(widths) < 3 or min(widths) < 1:
        raise ModelError(f"model {name!r}: an mlp to be cut needs three widths or more, all >= 1")
    return nn.Sequential(_dense(widths)), sample or (widths[0],)


def _dense(widths: list[int]) -> OrderedDict[str, nn.Module]:
    """Linear layers of these widths, ReLU behind all but the last."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (fan_in, fan_out) in enumerate(pairwise(widths), 1):
        linear = nn.Linear(fan_in, fan_out)
        last = i == len(widths) - 1
        layers[f"fc{i}"] = linear if last else nn.Sequential(linear, nn.ReLU())
    return layers


def _small_conv(name: str, argument: str, sample: Shape | None) -> tuple[nn.Module, Shape]:
    """A device half of few parameters: one convolution, and all else dense behind it."""
    filters, *widths = _widths(name, argument, "conv:4-32-10")
    if not widths or min(filters, *widths) < 1:
        raise ModelError(f"model {name!r}: filters, then widths, all >= 1, as in conv:4-32-10")
    channels, height, width = shape = _any_image(name, sample)
    if min(height, width) < 2:
        raise ModelError(f"model {name!r} takes images from 2x2 on, got {height}x{width}")
    conv1 = nn.Sequential(nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    dense = _dense([filters * (height // 2) * (width // 2), *widths])
    return nn.Sequential(OrderedDict(conv1=conv1) | dense), shape


def _lenet(options: Options) -> nn.Module:
    first = options.width
    second = 16 * first // 6
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Sequential(
                nn.Conv2d(options.channels, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)
            ),
            conv2=nn.Sequential(nn.Conv2d(first, second, 5), nn.ReLU(), nn.MaxPool2d(2)),
            flatten=nn.Flatten(),
            fc1=nn.Sequential(nn.Linear(25 * second, 120), nn.ReLU()),
            fc2=nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
            fc3=nn.Linear(84, options.classes),
        )
    )


def _alexnet(options: Options) -> nn.Module:
    """The layout published with GAS: nothing between conv3, conv4 and conv5, nor between fc's."""
    width = options.width
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Sequential(
                nn.Conv2d(options.channels, width, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()
            ),
            conv2=nn.Sequential(
                nn.Conv2d(width, 2 * width, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()
            ),
            conv3=nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            conv4=nn.Conv2d(4 * width, 8 * width, 3, padding=1),
            conv5=nn.Sequential(
                nn.Conv2d(8 * width, 8 * width, 3, padding=1), nn.MaxPool2d(3, 2), nn.ReLU()
            ),
            flatten=nn.Flatten(),
            fc1=nn.Linear(72 * width, 32 * width),
            fc2=nn.Linear(32 * width, 16 * width),
            fc3=nn.Linear(16 * width, options.classes),
        )
    )


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // _GROUP if channels % _GROUP == 0 else 1, channels)


def _conv(
    fan_in: int, fan_out: int, size: int, norm: Norm, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    convolution = nn.Conv2d(fan_in, fan_out, size, stride, size // 2, groups=groups, bias=False)
    return [convolution, norm(fan_out)]


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), or without the relu (MobileNetV2's bottlenecks are linear)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None, *, relu: bool) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self.relu = nn.ReLU() if relu else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (batch, channels, height, width) to h of as many dimensions."""
        h: Tensor = self.body(x)
        h = h + (x if self.shortcut is None else self.shortcut(x))
        return h if self.relu is None else self.relu(h)


def _basic_block(fan_in: int, fan_out: int, stride: int, norm: Norm) -> nn.Module:
    body = nn.Sequential(
        *_conv(fan_in, fan_out, 3, norm, stride), nn.ReLU(), *_conv(fan_out, fan_out, 3, norm)
    )
    same = fan_in == fan_out and stride == 1
    shortcut = None if same else nn.Sequential(*_conv(fan_in, fan_out, 1, norm, stride))
    return Residual(body, shortcut, relu=True)


def _resnet18(options: Options, norm: Norm) -> nn.Module:
    width = options.width
    layers = OrderedDict[str, nn.Module](
        stem=nn.Sequential(*_conv(options.channels, width, 3, norm), nn.ReLU())
    )
    fan_in = width
    for stage in range(4):
        fan_out, stride = width << stage, 1 if stage == 0 else 2
        layers[f"layer{stage + 1}"] = nn.Sequential(
            _basic_block(fan_in, fan_out, stride, norm), _basic_block(fan_out, fan_out, 1, norm)
        )
        fan_in = fan_out
    return nn.Sequential(layers | _head(fan_in, options.classes))


def _inverted(fan_in: int, fan_out: int, expansion: int, stride: int, norm: Norm) -> nn.Module:
    wide = fan_in * expansion
    expand = [*_conv(fan_in, wide, 1, norm), nn.ReLU6()] if expansion > 1 else []
    body = nn.Sequential(
        *expand, *_conv(wide, wide, 3, norm, stride, groups=wide), nn.ReLU6(),
        *_conv(wide, fan_out, 1, norm),
    )  # fmt: skip
    same = fan_in == fan_out and stride == 1
    return Residual(body, None, relu=False) if same else body


def _mobilenetv2(options: Options, norm: Norm) -> nn.Module:
    def scaled(channels: int) -> int:
        return max(1, channels * options.width // 32)

    fan_in = options.width
    layers = OrderedDict[str, nn.Module](
        stem=nn.Sequential(*_conv(options.channels, fan_in, 3, norm), nn.ReLU6())
    )
    for stage, (expansion, channels, repeats, stride) in enumerate(_INVERTED, 1):
        blocks: list[nn.Module] = []
        for repeat in range(repeats):
            blocks.append(
                _inverted(fan_in, scaled(channels), expansion, 1 if repeat else stride, norm)
            )
            fan_in = scaled(channels)
        layers[f"layer{stage}"] = nn.Sequential(*blocks)
    last = scaled(_LAST_CHANNELS)
    layers["last"] = nn.Sequential(*_conv(fan_in, last, 1, norm), nn.ReLU6())
    return nn.Sequential(layers | _head(last, options.classes))


def _head(features: int, classes: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(features, classes)
    )
