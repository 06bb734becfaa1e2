"""Model files as users write them, and tiny data for each; all have three classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

HEADER = "import torch\nfrom torch import nn\nfrom torch.nn import functional\n"

RESIDUAL = """
class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv2(self.relu(self.norm(self.conv1(x))))
        out += x
        return self.relu(out)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(functional.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))
"""

SHARED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.twice = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = self.drop(torch.tanh(self.twice(h)))
        h = self.drop(torch.tanh(self.twice(h)))
        return self.head(h)
"""

BATCHNORM = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        )
        self.head = nn.Linear(16, 3)
        for layer in (self.body[1], self.body[4]):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)).reshape(x.size(0), -1))
"""

FLATTEN = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.flat = nn.Flatten()
        self.fc = nn.Linear(32, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.relu(self.fc(self.flat(torch.relu(self.conv(x))))))
"""

EMBEDDING = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.positions = nn.Embedding(5, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.register_buffer("mask", torch.ones(5, 5).triu(1).bool())
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        places = torch.arange(tokens.size(1), device=tokens.device)
        h = self.embedding(tokens) + self.positions(places)
        return self.head(self.block(h, src_mask=self.mask).mean(1))
"""

TWO_INPUTS = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.dense = nn.Linear(3, 4)
        self.both = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x, token):
        h = self.dense(x) + self.embedding(token).squeeze(1)
        return self.head(torch.relu(self.both(torch.relu(h))))
"""

SOURCES = {
    "residual": RESIDUAL, "shared": SHARED, "batchnorm": BATCHNORM, "flatten": FLATTEN,
    "embedding": EMBEDDING, "two": TWO_INPUTS,
}  # fmt: skip
# As --input-shape says it.
SHAPES = {
    "residual": ["1,6,6"], "shared": ["8"], "batchnorm": ["1,6,6"], "flatten": ["1,6,6"],
    "embedding": ["int:5"], "two": ["3", "int:1"],
}  # fmt: skip


def write_model(folder: Path, kind: str) -> str:
    """Write a model's file; returns its MODEL argument."""
    path = folder / f"{kind}.py"
    path.write_text(HEADER + SOURCES[kind])
    return f"{path}:Net"


def write_data(folder: Path, kind: str, samples: int = 60) -> Path:
    """An npz data set whose labels can be learned from its samples."""
    random = np.random.default_rng(0)
    arrays = {}
    for split in "train", "test":
        y = random.integers(0, 3, samples)
        xs = [_array(random, text, y) for text in SHAPES[kind]]
        names = [f"x_{split}", f"x_{split}_1"]
        arrays |= dict(zip(names, xs, strict=False)) | {f"y_{split}": y}
    path = folder / f"{kind}.npz"
    np.savez(path, **arrays)
    return path


def _array(random: np.random.Generator, text: str, y: np.ndarray) -> np.ndarray:
    integer = text.startswith("int:")
    shape = tuple(map(int, text.removeprefix("int:").split(",")))
    if integer:
        return random.integers(0, 2, (len(y), *shape)) + 2 * y.reshape(-1, *(1 for _ in shape))
    noise = random.standard_normal((len(y), *shape)).astype(np.float32)
    return noise + y.reshape(-1, *(1 for _ in shape)).astype(np.float32)
