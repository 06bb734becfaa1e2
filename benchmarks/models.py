"""The halves that the benchmarks measure, as models of a user's own file.

The cut is the first module's name in each; the server half is as small as can be.
"""

from __future__ import annotations

import math

import torch
from torch import nn

WIDTH, TOKENS, HEADS = 768, 128, 12


class Block(nn.Module):
    """A pre-norm transformer block (Xiong et al. 2020) of width 768 on (batch, 128, 768)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X (batch, tokens, width) -> the same shape."""
        qkv = self.query_key_value(self.norm1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.transpose(-2, -1) / math.sqrt(WIDTH // HEADS), dim=-1)
        x = x + self.project((weights @ value).transpose(1, 2).flatten(2))
        y: torch.Tensor = x + self.feed(self.norm2(x))
        return y


class Tokens(nn.Module):
    """(batch, tokens, width) -> (batch, width): the mean over the tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Average over dimension 1."""
        return x.mean(dim=1)


def transformer() -> nn.Sequential:
    """One block of 7.1 M parameters before the cut."""
    return nn.Sequential(Block(), Tokens(), nn.Linear(WIDTH, 10))


def lenet() -> nn.Sequential:
    """LeNet-5 for 1x28x28 (LeCun et al. 1998), both convolutions before the cut: d_c = 2,572."""
    half = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip
    return nn.Sequential(half, nn.Flatten(), nn.Linear(400, 10))


def alexnet2() -> nn.Sequential:
    """The AlexNet for 3x32x32 of GAS, cut after its second block: d_c = 19,392."""
    half = nn.Sequential(*_alexnet_blocks()[:6])
    return nn.Sequential(half, nn.Flatten(), nn.Linear(64 * 8 * 8, 10))


def alexnet() -> nn.Sequential:
    """The same, cut after all its convolutions: d_c = 978,496."""
    return nn.Sequential(nn.Sequential(*_alexnet_blocks()), nn.Flatten(), nn.Linear(2304, 10))


def _alexnet_blocks() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1), nn.Conv2d(128, 256, 3, padding=1),
        nn.Conv2d(256, 256, 3, padding=1), nn.MaxPool2d(3, 2), nn.ReLU(),
    ]  # fmt: skip


def wide() -> nn.Sequential:
    """One linear layer of 16.8 M parameters (67 MB) before the cut."""
    return nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 10))


def linear_2k() -> nn.Sequential:
    """d_c = 2,080."""
    return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 10))


def linear_20k() -> nn.Sequential:
    """d_c = 20,100."""
    return nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 10))
