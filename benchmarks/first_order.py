"""A first-order device process: the same half in torch, forward, a gradient, backward, SGD step.

Started by memory.py as a process of its own; prints one JSON object with its peak resident memory
after the imports and at the end, and what autograd saved for the backward pass, in bytes. The
gradient at the cut stands for what a server would send. It imports what a device needs to talk too.

    python -m benchmarks.first_order FACTORY BATCH STEPS N,N,..
"""

from __future__ import annotations

import json
import sys

import torch

import wire_protocol.mqtt  # noqa: F401 - as a device would
from benchmarks import models
from edge_client.memory import memory_bytes


def main(factory: str, batch: str, steps: str, shape: str) -> None:
    """Take a few steps and tell what they held."""
    imports_bytes = memory_bytes()[1]
    torch.set_num_threads(1)
    half = getattr(models, factory)()[0].train()
    optimiser = torch.optim.SGD(half.parameters(), lr=1e-6)
    x = torch.randn(int(batch), *map(int, shape.split(",")))
    own = {p.untyped_storage().data_ptr() for p in (*half.parameters(), x)}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    for _ in range(int(steps)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            h = half(x)
        sent = h.detach().numpy().tobytes()
        gradient = torch.full_like(h, 1e-3)
        h.backward(gradient)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        del h, gradient, sent
    result = {
        "imports_bytes": imports_bytes,
        "peak_bytes": memory_bytes()[1],
        "saved_bytes": sum(saved.values()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
