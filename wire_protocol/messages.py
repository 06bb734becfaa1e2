"""Control messages: typed structs, msgpack behind an 8-byte envelope, capped in size.

Envelope: magic "MUSC", CRC-32 (zlib, little-endian) of the body; the body is one msgpack map whose
"type" names the message. Unknown types, unknown keys and values out of range are refused.
Who sends what, and when, is told in docs/wire-protocol.md.
"""

from __future__ import annotations

import struct
import zlib
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from wire_protocol.encodings import Compression, Encoding
from wire_protocol.energy import RunEnergy
from wire_protocol.errors import ChecksumError, MessageError, TruncatedError

MAGIC: Final = b"MUSC"
MAX_CONTROL_BYTES: Final = 1 << 20
# Below every broker's default packet limit (see docs/wire-protocol.md).
CHUNK_BYTES: Final = 32 << 10
MAX_MANIFEST_BYTES: Final = 16 << 20
_ENVELOPE: Final = struct.Struct("<4sI")
_Union = TypeVar("_Union")

U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]
# msgpack readers in other languages often stop at 63 bits.
U63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Text = Annotated[str, Meta(max_length=400)]
Seconds = Annotated[float, Meta(ge=0, le=1e10)]  # durations, and Unix time
StepSize = Annotated[float, Meta(ge=0, le=1e30)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
# What the client half learns from: losses at h+ and h- (paper), or dL/dh times h+ - h-.
Feedback = Literal["loss_difference", "cut_gradient"]
# How the estimate of a commit becomes a step (client_optimiser.py).
ClientOptimiser = Literal["sgd", "momentum", "adam"]
Chunk32K = Annotated[bytes, Meta(max_length=CHUNK_BYTES)]


class _Message(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of every control message."""


# device -> server


class Join(_Message, frozen=True, tag="join"):
    """I am here; sent on every connect and on every Hello until a Welcome or Refused comes."""

    epoch: U63
    protocol: U32
    version: Text
    shard_index: Annotated[int, Meta(ge=-1, lt=1 << 32)]  # -1: the shard does not say
    samples: U32


class Fetch(_Message, frozen=True, tag="fetch"):
    """Send me chunks first..first+count of the blob of this digest."""

    digest: Digest
    first: U32
    count: Annotated[int, Meta(ge=1, le=64)]


class Ready(_Message, frozen=True, tag="ready"):
    """My weights are those before round `next_round`; send what I miss. Repeated when idle."""

    run: U63
    epoch: U63
    next_round: U32


class Report(_Message, frozen=True, tag="report"):
    """What one round cost this device; bytes of the TCP stream, cumulative over the run."""

    run: U63
    epoch: U63
    round: U32
    started_unix_s: Seconds
    perturb_s: Seconds
    forward_s: Seconds
    encode_s: Seconds
    wait_s: Seconds
    replay_s: Seconds
    bytes_up: U63
    bytes_down: U63
    bundle_bytes_up: U63
    bundle_bytes_down: U63
    rss_bytes: U63
    peak_rss_bytes: U63
    energy: RunEnergy  # of the run so far, in this session


class Derivatives(_Message, frozen=True, tag="derivatives"):
    """Cut-gradient feedback: <dL/dh, h+ - h-> for each of my K directions."""

    run: U63
    epoch: U63
    round: U32
    scalars: bytes  # K float32, little-endian

    def __post_init__(self) -> None:
        """Whole float32 numbers only."""
        _check_scalars(self.scalars)


class Leave(_Message, frozen=True, tag="leave"):
    """I am gone: said on exit, or by the broker as this session's last will."""

    epoch: U63
    reason: Text


# server -> device


class Hello(_Message, frozen=True, tag="hello"):
    """The server has just (re)connected: every device joins again."""


class Welcome(_Message, frozen=True, tag="welcome"):
    """Your index, and everything that the arithmetic of this run depends on."""

    run: U63
    run_seed: U63
    epoch: U63  # the device's session this answers
    device: U32
    manifest_sha256: Digest
    manifest_bytes: Annotated[int, Meta(ge=1, le=MAX_MANIFEST_BYTES)]
    directions_sha256: Digest
    lam: Annotated[float, Meta(ge=1e-9, le=1e3)]
    batch: Annotated[int, Meta(ge=1, le=1_000_000)]
    directions: Annotated[int, Meta(ge=0, le=1_000_000)]  # K; 0 in a frozen-client control run
    rounds: U32
    encoding: Encoding  # of the frames
    compression: Compression
    next_round: U32  # the rounds that the server has committed
    feedback: Feedback
    optimiser: ClientOptimiser
    momentum: Fraction
    beta2: Fraction
    asynchronous: bool  # a commit holds one contribution; yours may come commits later
    # Ed25519, by the lab's signer, over a prefix and manifest_sha256; empty: not signed.
    bundle_signature: Annotated[bytes, Meta(max_length=64)] = b""


class Refused(_Message, frozen=True, tag="refused"):
    """You cannot take part, and why."""

    epoch: U63
    reason: Text


class Chunk(_Message, frozen=True, tag="chunk"):
    """One piece of a blob; the last may be short."""

    digest: Digest
    index: U32
    data: Chunk32K


class Round(_Message, frozen=True, tag="round"):
    """Round `round` is open for these devices (indices, ascending)."""

    run: U63
    round: U32
    participants: list[U32]


class Scalars(_Message, frozen=True, tag="scalars"):
    """Your round is complete; the K loss differences (float32, little-endian) are the reply."""

    run: U63
    round: U32
    scalars: bytes

    def __post_init__(self) -> None:
        """Whole float32 numbers only."""
        _check_scalars(self.scalars)


class Entry(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One device's share of a commit."""

    device: U32
    weight: Annotated[float, Meta(ge=0, le=1)]
    scalars: bytes  # K float32, little-endian: L(h+) - L(h-) per direction
    staleness: U32 = 0  # its directions are those of round `commit.round - staleness`

    def __post_init__(self) -> None:
        """Whole float32 numbers only."""
        _check_scalars(self.scalars)


class Commit(_Message, frozen=True, tag="commit"):
    """The client half's step of one round; applying it is docs/wire-protocol.md, "Replay"."""

    run: U63
    round: U32
    eta_c: StepSize
    eta_g: StepSize
    entries: list[Entry]  # ascending device index
    client_sha256: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""  # after this commit

    def __post_init__(self) -> None:
        """No entry is older than the run."""
        if any(entry.staleness > self.round for entry in self.entries):
            raise ValueError(f"entries: staleness beyond round {self.round}")


class Snapshot(_Message, frozen=True, tag="snapshot"):
    """Cheaper than the commits you miss: the client weights before `next_round`, as a blob."""

    run: U63
    next_round: U32
    sha256: Digest
    size_bytes: U63


class End(_Message, frozen=True, tag="end"):
    """The run is over; `final` devices may go, others wait for the next Hello."""

    run: U63
    final: bool
    reason: Text


UpMessage = Join | Fetch | Ready | Report | Derivatives | Leave
DownMessage = Hello | Welcome | Refused | Chunk | Round | Scalars | Commit | Snapshot | End

_ENCODER: Final = msgspec.msgpack.Encoder()
_UP: Final = msgspec.msgpack.Decoder(UpMessage)
_DOWN: Final = msgspec.msgpack.Decoder(DownMessage)


def encode(message: UpMessage | DownMessage) -> bytes:
    """The payload of a control message. Raises MessageError when it exceeds the cap."""
    body = _ENCODER.encode(message)
    if len(body) + _ENVELOPE.size > MAX_CONTROL_BYTES:
        raise MessageError(f"{type(message).__name__} of {len(body)} bytes exceeds the cap")
    return _ENVELOPE.pack(MAGIC, zlib.crc32(body)) + body


def decode_up(payload: bytes | memoryview) -> UpMessage:
    """Check and decode what a device sent. Raises a ProtocolError."""
    message: UpMessage = _decode(_UP, payload)
    return message


def decode_down(payload: bytes | memoryview) -> DownMessage:
    """Check and decode what the server sent. Raises a ProtocolError."""
    message: DownMessage = _decode(_DOWN, payload)
    return message


def printable(text: str) -> str:
    """What the other side wrote, without control characters, which could steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _check_scalars(scalars: bytes) -> None:
    if len(scalars) % 4:  # msgspec makes a refusal of it
        raise ValueError(f"scalars: {len(scalars)} bytes are no whole number of float32")


def _decode(decoder: msgspec.msgpack.Decoder[_Union], payload: bytes | memoryview) -> _Union:
    if len(payload) > MAX_CONTROL_BYTES:
        raise MessageError(f"control message of {len(payload)} bytes exceeds {MAX_CONTROL_BYTES}")
    if len(payload) < _ENVELOPE.size:
        raise TruncatedError(f"control message of {len(payload)} bytes has no whole envelope")
    magic, crc = _ENVELOPE.unpack_from(payload)
    body = memoryview(payload)[_ENVELOPE.size :]
    if magic != MAGIC:
        raise MessageError(f"control message starts with {magic!r}, not {MAGIC!r}")
    if zlib.crc32(body) != crc:
        raise ChecksumError("control message checksum does not match: the payload was altered")
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"control message is malformed: {error}") from error
