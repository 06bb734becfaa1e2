"""What a plain ONNX Runtime forward of a graph holds inside: bytes of peak memory it adds.

Started by memory.py as a process of its own. Input and output are there before; the session's
memory pattern is off, so nothing is reserved that is not used.

    python -m benchmarks.plain_forward GRAPH BATCH N,N,..
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge_client.memory import memory_bytes


def main(graph: str, batch: str, shape: str) -> None:
    """Print the growth of the peak from an open session to one that has run."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_mem_pattern = False
    session = ort.InferenceSession(
        Path(graph).read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    x = np.ones((int(batch), *map(int, shape.split(","))), np.float32)
    before_bytes = memory_bytes()[1]
    (output,) = session.run(None, {session.get_inputs()[0].name: x})
    print(max(0, memory_bytes()[1] - before_bytes - output.nbytes))


if __name__ == "__main__":
    main(*sys.argv[1:])
