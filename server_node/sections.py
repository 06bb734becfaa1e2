"""The sections of a run's configuration, as frozen structs.

docs/configuration.md explains every field; a test keeps it complete.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from wire_protocol.encodings import Compression, Encoding
from wire_protocol.messages import ClientOptimiser, Feedback

AtLeast1 = Annotated[int, Meta(ge=1, le=1_000_000)]
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
# The upper bounds keep out infinity, and steps that no float32 holds.
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Positive = Annotated[float, Meta(gt=0, le=1e30)]
NotNegative = Annotated[float, Meta(ge=0, le=1e30)]
Speed = Annotated[float, Meta(gt=0, le=1)]
# Up to what MQTT itself allows (3.1.1, section 2.2.3).
PacketLimit = Annotated[int, Meta(ge=0, le=268_435_455)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the TOML file."""


class RunSection(Section, frozen=True):
    """Which run, how long, for whom."""

    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    rounds: AtLeast1 = 200
    fleet: str = "lab"


class ModelSection(Section, frozen=True):
    """What is trained, and where it is cut."""

    name: str = "mlp:64-32-32-10"
    cut: str = "fc1"
    # One shape, or one text per input: "1,28,28", "int:64" (export/inputs.py).
    input_shape: Annotated[list[AtLeast1 | str], Meta(max_length=8)] = []
    weights: str = ""
    # What the device perturbs: names, "norms", "adapters:R", or "none"; empty: everything.
    perturb: Annotated[list[str], Meta(max_length=256)] = []


class DataSection(Section, frozen=True):
    """What it is trained on."""

    source: str = "digits"
    channels_last: bool = False
    pool: AtLeast1 = 1
    scale: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    standardise: Literal["none", "global", "feature"] = "global"
    alpha: NotNegative = 0.0
    holdout: Fraction = 0.0
    # Training samples that the server may know; from another source, if that is named.
    public: Count = 0
    public_source: str = ""
    # What the devices' and the test samples have gone through; public samples have not.
    shift: Literal["none", "rotate90", "invert", "gain"] = "none"
    # Devices hold each training image mirrored left to right too. Unset it is not in a
    # configuration's digest, so that those of published results stay.
    mirror: bool | UnsetType = UNSET
    window: Count = 0
    stride: Count = 0
    label: str = "label"
    group: str = ""


class DevicesSection(Section, frozen=True):
    """The fleet."""

    count: AtLeast1 = 8
    participants: Count = 0
    batch: AtLeast1 = 32
    threads: AtLeast1 = 1


class MethodSection(Section, frozen=True):
    """MU-SplitFed: directions, steps and tau; which order and feedback each half learns by."""

    tau: AtLeast1 = 16
    tau_mode: Literal["fixed", "adaptive"] = "fixed"
    tau_cap: AtLeast1 = 128  # adaptive: never more
    directions_client: AtLeast1 = 16
    directions_server: AtLeast1 = 1
    eta_c: NotNegative = 0.2
    eta_s: NotNegative = 0.015
    eta_g: Positive = 1.0
    lam: Annotated[float, Meta(ge=1e-9, le=1e3)] = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    feedback: Feedback = "loss_difference"
    server_order: Literal["zeroth", "first"] = "zeroth"
    # First order: a class of torch.optim, and its arguments beside the step size eta_s.
    server_optimiser: str = "SGD"
    server_options: dict[str, float | bool | list[float]] = {}
    # What a server step is computed on: one device's frames, or those of all devices of the round.
    server_batch: Literal["device", "pooled"] = "device"
    # Pooled: frames of devices that are not here (yet) count for so many rounds.
    reuse_rounds: Count = 0
    client_optimiser: ClientOptimiser = "sgd"
    momentum: Fraction = 0.9
    beta2: Fraction = 0.999

    def directions(self, parameters: int) -> int:
        """K that devices are asked for; a frozen client half (d_c or eta_c is 0) needs none."""
        return self.directions_client if self.eta_c and parameters else 0


class RoundSection(Section, frozen=True):
    """How long a round waits, and for whom."""

    mode: Literal["barrier", "asynchronous"] = "barrier"
    # Asynchronous: a contribution that is s commits old counts (1 + s) ** -staleness_power.
    staleness_power: Annotated[float, Meta(ge=0, le=10)] = 0.5
    staleness_limit: AtLeast1 = 1000  # older contributions are dropped
    quorum: Count = 0
    deadline_s: Seconds = 0.0
    rejoin_s: Seconds = 60.0
    stall_s: Positive = 300.0
    lobby_s: Positive = 300.0


class GuardsSection(Section, frozen=True):
    """What keeps large steps and a large tau from doing harm; every intervention is journaled."""

    # Scalars beyond this many running medians are cut down to that; 0: never.
    clip: NotNegative = 0.0
    # A step that raises the loss of its own batch is taken back, and the next are smaller.
    reject: bool = False
    # After the averaging: of the fractions 1, 1/2, 1/4, 1/8, 0 of the step, the best.
    backtrack_server: bool = False
    # The same of the client's step, by its predicted effect; and smaller ones after a jump.
    backtrack_client: bool = False
    # Rounds in a row above `diverged_factor` times the best pooled loss end the run; 0: never.
    patience: Count = 20
    diverged_factor: Annotated[float, Meta(gt=1, le=1e6)] = 3.0


class WireSection(Section, frozen=True):
    """How tensors cross the network."""

    encoding: Encoding = "float32"
    compression: Compression = "none"
    packet_limit: PacketLimit = 0


class ServerSection(Section, frozen=True):
    """Where the server half computes."""

    device: Literal["cpu", "cuda"] = "cpu"
    threads: AtLeast1 = 1
    replicas: AtLeast1 = 1
    min_step_s: Seconds = 0.0
    # First order: frames.bin begins anew with a checkpoint when it is larger than this.
    frames_mb: AtLeast1 = 256


class EvaluationSection(Section, frozen=True):
    """When the test set is scored."""

    every: AtLeast1 = 10
    control: bool = True
    target: Annotated[float, Meta(ge=0, le=1)] = 0.0  # accuracy to count energy to; 0: none


class EmulationSection(Section, frozen=True):
    """What an emulated fleet is slowed by; ignored by real boards."""

    speed: list[Speed] = []
    delay_s: list[Seconds] = []
    fleet: str = ""  # a fleet file, which stands instead of speed and delay_s
    max_packet_bytes: PacketLimit = 0


class SimulationSection(Section, frozen=True):
    """The virtual clock: what devices, links and server take; ignored by real and emulated runs."""

    compute: Literal["none", "exponential", "uniform", "gas", "recorded"] = "none"
    # Means of a device's whole step, cycled over the devices.
    mean_s: Annotated[list[Seconds], Meta(min_length=1)] = field(default_factory=lambda: [1.0])
    spread: Annotated[float, Meta(ge=0, le=1)] = 0.5  # uniform: mean_s times 1 - spread .. 1 + it
    # gas: a device's FLOP/s, lowest and highest; its channel.
    flops: Annotated[list[Positive], Meta(min_length=2, max_length=2)] = field(
        default_factory=lambda: [1e9, 1e10]
    )
    bandwidth_hz: Positive = 1e7
    power_w: Positive = 0.2
    radius_km: Positive = 0.5
    recorded: str = ""  # a run folder whose times are taken over
    # Cycled over the devices; empty: a link takes no time but its latency.
    up_bytes_s: list[Positive] = []
    down_bytes_s: list[Positive] = []
    latency_s: Seconds = 0.0
    server: Literal["serial", "parallel"] = "serial"
    server_step_s: Seconds = 0.0
    server_measure_s: Seconds = 0.0  # a direction
    # Mean spells of being there and of being away; 0: nobody leaves.
    up_s: Seconds = 0.0
    down_s: Seconds = 0.0
