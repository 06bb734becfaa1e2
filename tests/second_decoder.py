"""A second decoder of the wire, written from docs/wire-protocol.md alone.

It imports nothing of the project: the standard library, numpy and zstd are all it stands on, so
that whatever the document leaves out is missing here too.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from backports import zstd


class Refused(Exception):  # noqa: N818 - the document's word
    """What a receiver must refuse."""


def demand(holds: bool, what: str) -> None:  # noqa: FBT001
    if not holds:
        raise Refused(what)


# -- MQTT: the PUBLISH packets of a recorded stream (MQTT 5, sections 2.1 and 3.3)


class Published(NamedTuple):
    topic: str
    payload: bytes


def variable_integer(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at


def published(stream: bytes, *, mqtt5: bool = True) -> Iterator[Published]:
    """Every PUBLISH of one direction of one connection; a last packet may be cut."""
    at = 0
    while at + 5 <= len(stream):
        command = stream[at]
        length, body = variable_integer(stream, at + 1)
        at = body + length
        if at > len(stream):
            return
        if command >> 4 != 3:
            continue
        topic_bytes = int.from_bytes(stream[body : body + 2], "big")
        topic = stream[body + 2 : body + 2 + topic_bytes].decode()
        body += 2 + topic_bytes + (2 if command & 6 else 0)
        if mqtt5:
            properties, body = variable_integer(stream, body)
            body += properties
        yield Published(topic, stream[body:at])


# -- parts


def joined(messages: Iterator[Published]) -> Iterator[Published]:
    """Whole messages; parts are put together by topic and digest."""
    waiting: dict[tuple[str, bytes], dict[int, bytes]] = {}
    for topic, payload in messages:
        if payload[:4] != b"MUSP":
            yield Published(topic, payload)
            continue
        version, zero, index, count, total = struct.unpack_from("<B3sIII", payload, 4)
        digest, data = payload[20:52], payload[52:]
        demand(version == 1 and zero == b"\0\0\0", "part header")
        demand(2 <= count <= 16384 and index < count and total <= 64 << 20, "part range")
        size = -(-total // count)
        last = total - (count - 1) * size
        demand(last >= 1 and len(data) == (size if index < count - 1 else last), "part size")
        parts = waiting.setdefault((topic, digest), {})
        parts[index] = data
        if len(parts) == count:
            whole = b"".join(parts[i] for i in range(count))
            demand(hashlib.sha256(whole).digest() == digest, "part digest")
            del waiting[topic, digest]
            yield Published(topic, whole)


# -- msgpack, by its specification


def unpack(data: bytes) -> Any:
    value, end = _unpack(data, 0)
    demand(end == len(data), "bytes after the map")
    return value


def _unpack(data: bytes, at: int) -> tuple[Any, int]:  # noqa: PLR0911
    kind = data[at]
    at += 1
    if kind <= 0x7F:
        return kind, at
    if kind >= 0xE0:
        return kind - 256, at
    if kind <= 0x8F:
        return _map(data, at, kind & 15)
    if kind <= 0x9F:
        return _array(data, at, kind & 15)
    if kind <= 0xBF:
        return data[at : at + (kind & 31)].decode(), at + (kind & 31)
    if kind in (0xC2, 0xC3):
        return kind == 0xC3, at
    numbers = {
        0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
        0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
    }  # fmt: skip
    if kind in numbers:
        (number,) = struct.unpack_from(numbers[kind], data, at)
        return number, at + struct.calcsize(numbers[kind])
    widths = {
        0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4,
    }  # fmt: skip
    demand(kind in widths, f"msgpack type {kind:#x}")
    width = widths[kind]
    count, at = int.from_bytes(data[at : at + width], "big"), at + width
    if kind <= 0xC6:
        return data[at : at + count], at + count
    if kind <= 0xDB:
        return data[at : at + count].decode(), at + count
    return _array(data, at, count) if kind <= 0xDD else _map(data, at, count)


def _array(data: bytes, at: int, count: int) -> tuple[list[Any], int]:
    items = []
    for _ in range(count):
        item, at = _unpack(data, at)
        items.append(item)
    return items, at


def _map(data: bytes, at: int, count: int) -> tuple[dict[str, Any], int]:
    items: dict[str, Any] = {}
    for _ in range(count):
        key, at = _unpack(data, at)
        items[key], at = _unpack(data, at)
    return items, at


# -- control messages

FIELDS = {
    "join": "epoch protocol version shard_index samples",
    "fetch": "digest first count",
    "ready": "run epoch next_round",
    "report": "run epoch round started_unix_s perturb_s forward_s encode_s wait_s replay_s "
    "bytes_up bytes_down bundle_bytes_up bundle_bytes_down rss_bytes peak_rss_bytes",
    "derivatives": "run epoch round scalars",
    "leave": "epoch reason",
    "hello": "",
    "welcome": "run run_seed epoch device manifest_sha256 manifest_bytes directions_sha256 lam "
    "batch directions rounds encoding compression next_round feedback optimiser momentum beta2 "
    "asynchronous bundle_signature",
    "refused": "epoch reason",
    "chunk": "digest index data",
    "round": "run round participants",
    "scalars": "run round scalars",
    "commit": "run round eta_c eta_g entries client_sha256",
    "snapshot": "run next_round sha256 size_bytes",
    "end": "run final reason",
}
UPLINK = {"join", "fetch", "ready", "report", "derivatives", "leave"}


def control(payload: bytes) -> dict[str, Any]:
    demand(8 <= len(payload) <= 1 << 20 and payload[:4] == b"MUSC", "envelope")
    demand(zlib.crc32(payload[8:]) == int.from_bytes(payload[4:8], "little"), "CRC")
    message = unpack(payload[8:])
    demand(message.get("type") in FIELDS, "type")
    wanted = {"type", *FIELDS[message["type"]].split()}
    optional = {"client_sha256", "bundle_signature"}
    demand(message.keys() | optional >= wanted >= message.keys(), "keys")
    return message


# -- frames


class Frame(NamedTuple):
    kind: int
    dtype: int
    compressed: bool
    run: int
    epoch: int
    round: int
    first_k: int
    tensor: np.ndarray
    labels: np.ndarray


def frame(payload: bytes) -> Frame:
    demand(72 <= len(payload) <= 64 << 20 and payload[:4] == b"MUSF", "frame")
    version, kind, dtype, compression, ndim, label_bytes, axis, zero = payload[4:12]
    (crc,) = struct.unpack_from("<I", payload, 12)
    fields = struct.unpack_from("<QQIIII6I", payload, 16)
    run, epoch, number, first_k, labels, group, *dims = fields
    demand(version == 2 and kind in (1, 2, 4) and dtype in (1, 2, 3, 4) and not zero, "header")
    demand(compression in (0, 1) and 1 <= ndim <= 6 and not any(dims[ndim:]), "header")
    demand(label_bytes in ((1, 2, 4) if labels else (0,)), "labels")
    shape = dims[:ndim]
    n, rows = int(np.prod(shape, dtype=object)), shape[0] if kind == 2 else 1
    demand(n > 0 and n * 4 <= 64 << 20, "shape")
    scales = 0
    if dtype == 2:
        scales = rows
    elif dtype > 2:
        demand((2 if kind == 2 else 1) <= axis < ndim and 1 <= group <= shape[axis], "channels")
        scales = rows * max(1, shape[axis] // group)
    size = {1: 4 * n, 2: 2 * n, 3: n, 4: n + (n + 1) // 2}[dtype]
    length = 4 * scales + size + labels * label_bytes
    body = payload[72:]
    demand(len(body) == length if not compression else len(body) <= length, "length")
    demand(zlib.crc32(payload[16:]) == crc, "CRC")
    if compression:
        stream = zstd.ZstdDecompressor()
        body = stream.decompress(body, max_length=length + 1)
        demand(len(body) == length and stream.eof and not stream.unused_data, "zstd")
    factors = np.frombuffer(body, "<f4", scales)
    demand(bool(np.isfinite(factors).all() and (factors >= 0).all()), "scales")
    raw = body[4 * scales : 4 * scales + size]
    tensor = values(raw, dtype, shape, factors, rows, axis, group)
    class_numbers = np.frombuffer(body, f"<u{label_bytes or 1}", labels, 4 * scales + size)
    return Frame(kind, dtype, bool(compression), run, epoch, number, first_k, tensor, class_numbers)


def values(
    raw: bytes, dtype: int, shape: list[int], factors: np.ndarray, rows: int, axis: int, group: int
) -> np.ndarray:
    n = int(np.prod(shape))
    if dtype == 1:
        return np.frombuffer(raw, "<f4").reshape(shape)
    if dtype == 2:
        halves = np.frombuffer(raw, "<f2").astype(np.float32).reshape(rows, -1)
        return (halves * factors[:, None]).reshape(shape)
    q = np.frombuffer(raw[:n], np.int8).astype(np.float32)
    if dtype == 4:
        plane = np.frombuffer(raw[n:], np.uint8)
        nibbles = np.stack([plane & 15, plane >> 4], axis=1).reshape(-1)[:n]
        q = q + (nibbles.astype(np.float32) - 8) / 16
    channels = shape[axis]
    per_row = max(1, channels // group)
    position = np.arange(n)
    inner = int(np.prod(shape[axis + 1 :]))
    channel = position // inner % channels
    row = position // (n // rows)
    scale = factors[row * per_row + np.minimum(channel // group, per_row - 1)]
    return (q * scale).astype(np.float32).reshape(shape)


# -- directions and replay


def signs(run_seed: int, device: int, number: int, k: int, count: int) -> np.ndarray:
    """u of the client half: bit 0 is +1, bit 1 is -1."""
    generator = np.random.Philox(key=[run_seed, device], counter=[0, number << 32, k, 0])
    words = generator.random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:count]
    return bits == 0


def apply(theta: np.ndarray, commit: dict[str, Any], run_seed: int, lam: float) -> None:
    """One commit, as "Replay" says, for the optimiser `sgd`."""
    for device, weight, scalars, staleness in commit["entries"]:
        deltas = np.frombuffer(scalars, "<f4").astype(np.float64)
        n = len(deltas)
        if n == 0:
            continue
        c = ((commit["eta_g"] * weight) * commit["eta_c"]) / ((n * 2.0) * lam)
        for k, delta in enumerate(deltas.tolist()):
            s = np.float32(-c * delta)
            plus = signs(run_seed, device, commit["round"] - staleness, k, len(theta))
            theta += np.where(plus, s, -s)
