"""What the bits of a forward pass depend on beside its input: set here, and written down."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch

from server_node.errors import ConfigError
from server_node.sections import ServerSection

_VERSIONED: Final = ("musplit", "torch", "numpy", "onnxruntime", "onnx", "paho-mqtt", "msgspec")
# Environment variables by which the libraries under torch choose kernels and threads.
_SWITCHES: Final = (
    "ATEN_", "CUBLAS_", "CUDNN_", "DNNL_", "GOMP_", "KMP_", "MKL_", "NVIDIA_TF32_", "OMP_",
    "ONEDNN_", "TORCH_ALLOW_TF32_", "TORCH_BLAS_",
)  # fmt: skip
# Instruction sets that change how floats are added, by the names of /proc/cpuinfo.
_INSTRUCTIONS: Final = ("sse4", "avx", "fma", "amx", "asimd", "sve", "sme", "neon", "bf16")
_CPUINFO: Final = Path("/proc/cpuinfo")


def fix_arithmetic(server: ServerSection) -> None:
    """Make a repeated run compute the same bits on the same machine. Raises ConfigError.

    Threads inside an operation are set for this thread, so call it where the run computes; eager
    torch uses no threads between operations. float32 is multiplied as float32, never as TF32 or
    bfloat16. On CUDA kernels are deterministic; an operation that has none warns, once, and a
    repetition may differ then (torch, "Reproducibility"). A replay never depends on this.
    """
    if server.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("server.device: no CUDA device here; use --set server.device=cpu")
    torch.set_num_threads(server.threads)
    torch.set_float32_matmul_precision("highest")
    if server.device == "cuda":
        # Read when cuBLAS is first used; the value is one of two that its documentation gives.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        # Nothing here reads memory that was not written: spare the filling.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def environment() -> dict[str, str]:
    """Versions, machine, threads and switches: part of a run's identity."""
    facts = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: version(name) for name in _VERSIONED},
        "processor": _cpuinfo("model name") or platform.processor() or "unknown",
        "instructions": " ".join(
            sorted(f for f in _features() if any(name in f for name in _INSTRUCTIONS))
        ),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": str(torch.get_num_threads()),
        "torch_interop_threads": str(torch.get_num_interop_threads()),
    }
    if torch.cuda.is_available():
        facts["cuda"] = str(torch.version.cuda)
        facts["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        facts["cuda_device"] = torch.cuda.get_device_name()
    for name in sorted(os.environ):
        if name.startswith(_SWITCHES):  # a value may hold bytes that are no text
            facts[name] = os.environ[name].encode(errors="replace").decode()
    return facts


def _features() -> list[str]:
    """CPU features as Linux names them (x86: flags; Arm: Features); empty elsewhere."""
    return (_cpuinfo("flags") or _cpuinfo("Features")).split()


def _cpuinfo(key: str) -> str:
    """The first value of a key of /proc/cpuinfo, or nothing."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "")
