"""The one file that knows onnxruntime: the client half as a forward-only session.

Weights are bound once as views of one flat buffer; changing the buffer changes the next forward,
without a copy. Spinning is off: on a waiting board it only burns energy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_client.bundle import Bundle
from edge_client.errors import BundleError
from wire_protocol.manifest import Manifest


class ClientSession:
    """Forward passes of the client half at a fixed batch size.

    `parameters` (d_c,) float32 is the live weight buffer that the graph reads.
    """

    def __init__(self, bundle: Bundle, batch: int, threads: int) -> None:
        manifest = bundle.manifest
        self._store = np.empty(manifest.weights.size_bytes, np.uint8)
        bundle.read_weights(self._store)
        self.parameters: NDArray[np.float32] = self._store[: manifest.parameters * 4].view("<f4")
        self._inputs = [np.empty((batch, *i.shape), i.dtype) for i in manifest.inputs]
        shape = (batch, *manifest.activation.shape)
        # Two, used in turns: h+ stays while h- is computed.
        self._outputs = [np.empty(shape, np.float32) for _ in range(2)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # The pattern reserves the sum of what a forward uses, not its peak: 20 MB more for a
        # transformer block, and no faster. The arena stays: without it malloc keeps even more.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = _open_session(bundle.graph, options)
            self._bindings = [self._bind(manifest, output) for output in self._outputs]
        except (RuntimeError, ValueError, AttributeError) as error:
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise BundleError(
                f"bundle {bundle.digest[:12]}: ONNX Runtime {ort.__version__} refuses the graph "
                f"({first_line}); export it again or update onnxruntime"
            ) from error

    def forward(self, xs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """xs[input] (batch, *input shape) -> activation (batch, *activation shape).

        The result is one of two buffers: it outlives the next call, not the one after.
        """
        for array, x in zip(self._inputs, xs, strict=True):
            array[...] = x
        self._bindings.reverse()
        self._outputs.reverse()
        self._session.run_with_iobinding(self._bindings[0])
        return self._outputs[0]

    def _bind(self, manifest: Manifest, output: NDArray[np.float32]) -> ort.IOBinding:
        """Everything the graph reads and writes; bound are pointers, the arrays are kept here."""
        binding = self._session.io_binding()
        for tensor in manifest.tensors:
            begin = tensor.offset_bytes
            view = self._store[begin : begin + tensor.size_bytes]
            _bind_input(binding, tensor.name, view.view(tensor.dtype).reshape(tensor.shape))
        for spec, array in zip(manifest.inputs, self._inputs, strict=True):
            _bind_input(binding, spec.name, array)
        binding.bind_output(
            manifest.activation.name, "cpu", 0, np.float32, output.shape, output.ctypes.data
        )
        return binding


def _bind_input(binding: ort.IOBinding, name: str, array: NDArray[np.generic]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _open_session(graph: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    # A graph may name files to take weights from: it gets an empty folder, not the board's.
    with tempfile.TemporaryDirectory() as nowhere:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", nowhere
        )
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
