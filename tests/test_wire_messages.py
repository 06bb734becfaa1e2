"""Control messages: exact bytes, and nothing malformed gets through."""

from __future__ import annotations

import contextlib
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire_protocol import messages as m
from wire_protocol.errors import ChecksumError, MessageError, ProtocolError, TruncatedError

Message = m.UpMessage | m.DownMessage
Decode = Callable[[bytes], Message]

DIGEST = "0123456789abcdef" * 4
TOP = (1 << 63) - 1
TOP_32 = (1 << 32) - 1
REPORT = m.Report(
    run=1, epoch=2, round=3, started_unix_s=1.75e9, perturb_s=0.0, forward_s=0.25, encode_s=1e-9,
    wait_s=3600.5, replay_s=1.0, bytes_up=TOP, bytes_down=0, bundle_bytes_up=1, bundle_bytes_down=2,
    rss_bytes=3, peak_rss_bytes=4,
)  # fmt: skip
WELCOME = m.Welcome(
    run=TOP, run_seed=TOP, epoch=TOP, device=TOP_32, manifest_sha256=DIGEST, manifest_bytes=1,
    directions_sha256=DIGEST, lam=0.005, batch=32, directions=0, rounds=TOP_32,
    encoding="int8", compression="zstd", next_round=TOP_32,
    feedback="cut_gradient", optimiser="adam", momentum=0.5, beta2=0.99, asynchronous=True,
    bundle_signature=bytes(range(64)),
)  # fmt: skip
COMMIT = m.Commit(
    run=1, round=2, eta_c=0.5, eta_g=1.0, client_sha256=DIGEST,
    entries=[m.Entry(0, 0.25, b"\0\0\0\0\0\0\x80\x3f"), m.Entry(TOP_32, 0.75, b"", 2)],
)  # fmt: skip
UP: list[Message] = [
    m.Join(epoch=TOP, protocol=1, version="0.1.0+ü", shard_index=-1, samples=10),
    m.Join(epoch=0, protocol=TOP_32, version="", shard_index=TOP_32, samples=TOP_32),
    m.Fetch(digest=DIGEST, first=0, count=64),
    m.Ready(run=1, epoch=2, next_round=3),
    REPORT,
    m.Derivatives(run=1, epoch=2, round=3, scalars=b"\0\0\x80\x3f"),
    m.Leave(epoch=5, reason="x" * 400),
]
DOWN: list[Message] = [
    m.Hello(),
    WELCOME,
    m.Refused(epoch=1, reason="the fleet is full"),
    m.Chunk(digest=DIGEST, index=7, data=bytes(range(256))),
    m.Round(run=1, round=2, participants=[0, 1, TOP_32]),
    m.Round(run=1, round=2, participants=[]),
    m.Scalars(run=1, round=2, scalars=b"\0\0\x80\x3f"),
    COMMIT,
    m.Commit(run=1, round=2, eta_c=0.5, eta_g=1.0, entries=[]),
    m.Snapshot(run=1, next_round=2, sha256=DIGEST, size_bytes=TOP),
    m.End(run=1, final=True, reason="done"),
]
EVERY: list[tuple[Decode, Message]] = [
    *((m.decode_up, message) for message in UP),
    *((m.decode_down, message) for message in DOWN),
]
NAMES = [type(message).__name__ for _, message in EVERY]
every_message = pytest.mark.parametrize(("decode", "message"), EVERY, ids=NAMES)
# {"type": "ready", "run": 1, "epoch": 2, "next_round": 300} behind magic and CRC-32.
GOLDEN = bytes.fromhex(
    "4d555343 869b801f"
    "84 a474797065 a57265616479 a372756e 01 a565706f6368 02 aa6e6578745f726f756e64 cd012c"
)


def sealed(body: bytes) -> bytes:
    """A body behind an envelope that is right."""
    return struct.pack("<4sI", b"MUSC", zlib.crc32(body)) + body


def fields(message: Message) -> dict[str, Any]:
    return msgspec.msgpack.decode(m.encode(message)[8:])


def forged(message: Message, **changes: Any) -> bytes:
    """`message` with fields changed or added, as a sender without our checks would send it."""
    return sealed(msgspec.msgpack.encode(fields(message) | changes))


def test_golden_bytes() -> None:
    message = m.Ready(run=1, epoch=2, next_round=300)
    assert m.encode(message) == GOLDEN
    assert m.decode_up(GOLDEN) == message


def test_the_list_holds_every_message_of_the_protocol() -> None:
    assert {type(message) for message in UP} == set(m.UpMessage.__args__)
    assert {type(message) for message in DOWN} == set(m.DownMessage.__args__)


@every_message
def test_round_trip(decode: Decode, message: Message) -> None:
    assert decode(m.encode(message)) == message


@every_message
def test_truncation_at_every_byte_is_refused(decode: Decode, message: Message) -> None:
    payload = m.encode(message)
    for length in range(len(payload)):
        with pytest.raises(TruncatedError if length < 8 else ChecksumError):
            decode(payload[:length])


@every_message
def test_a_truncated_body_is_refused_though_its_checksum_is_right(
    decode: Decode, message: Message
) -> None:
    body = m.encode(message)[8:]
    for length in range(len(body)):
        with pytest.raises(MessageError):
            decode(sealed(body[:length]))


@pytest.mark.parametrize("byte", range(len(GOLDEN)))
def test_every_flipped_bit_is_refused(byte: int) -> None:
    for bit in range(8):
        payload = bytearray(GOLDEN)
        payload[byte] ^= 1 << bit
        with pytest.raises(ProtocolError):
            m.decode_up(bytes(payload))


@every_message
def test_unknown_keys_and_types_are_refused(decode: Decode, message: Message) -> None:
    with pytest.raises(MessageError, match="surprise"):
        decode(forged(message, surprise=1))
    with pytest.raises(MessageError, match="type"):
        decode(forged(message, type="surprise"))


@every_message
def test_a_missing_field_is_refused(decode: Decode, message: Message) -> None:
    whole = fields(message)
    for name in set(whole) - {"client_sha256", "bundle_signature"}:  # have defaults
        without = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(MessageError, match=name):
            decode(sealed(msgspec.msgpack.encode(without)))


@every_message
def test_a_message_in_the_wrong_direction_is_refused(decode: Decode, message: Message) -> None:
    other = m.decode_up if decode is m.decode_down else m.decode_down
    with pytest.raises(MessageError, match="type"):
        other(m.encode(message))


def number_fields() -> list[tuple[Decode, Message, str]]:
    """Every integer and float field of every message; bool is no number."""
    seen = {type(message): (decode, message) for decode, message in EVERY}
    return [
        (decode, message, name)
        for decode, message in seen.values()
        for name, value in fields(message).items()
        if type(value) in (int, float)
    ]


@pytest.mark.parametrize(("decode", "message", "name"), number_fields())
def test_numbers_out_of_range_are_refused(decode: Decode, message: Message, name: str) -> None:
    """All but the learning rates, which may be any float."""
    if name in ("eta_c", "eta_g"):
        wrong: list[Any] = ["1", None, [1.0]]
    elif isinstance(getattr(message, name), float):
        wrong = [-1e-9, -1, -math.inf, math.nan, "1", None]
    else:
        wrong = [-2, 1 << 63, (1 << 64) - 1, 1.5, math.nan, "1", None, True]
    for value in wrong:
        with pytest.raises(MessageError, match=name):
            decode(forged(message, **{name: value}))


ENTRY = [0, 0.5, b"\0\0\0\0"]
WRONG = {
    "32-bit round": (REPORT, {"round": 1 << 32}),
    "shard index -2": (UP[0], {"shard_index": -2}),
    "no chunk asked for": (UP[2], {"count": 0}),
    "too many chunks asked for": (UP[2], {"count": 65}),
    "short digest": (UP[2], {"digest": DIGEST[:-1]}),
    "long digest": (UP[2], {"digest": DIGEST + "0"}),
    "uppercase digest": (UP[2], {"digest": DIGEST.upper()}),
    "digest that is a path": (UP[2], {"digest": "../" * 21 + "a"}),
    "digest with a line end": (UP[2], {"digest": DIGEST + "\n"}),
    "commit digest with a line end": (COMMIT, {"client_sha256": DIGEST + "\n"}),
    "commit digest of a line end alone": (COMMIT, {"client_sha256": "\n"}),
    "reason too long": (UP[5], {"reason": "x" * 401}),
    "lam 0": (WELCOME, {"lam": 0.0}),
    "batch 0": (WELCOME, {"batch": 0}),
    "batch too large": (WELCOME, {"batch": 1 << 20}),
    "chunk too large": (DOWN[3], {"data": bytes(m.CHUNK_BYTES + 1)}),
    "text for bytes": (DOWN[3], {"data": 5}),
    "negative participant": (DOWN[4], {"participants": [-1]}),
    "participants are no list": (DOWN[4], {"participants": {}}),
    "entry too short": (COMMIT, {"entries": [ENTRY[:2]]}),
    "entry too long": (COMMIT, {"entries": [[*ENTRY, 0, 0]]}),
    "entry of a negative device": (COMMIT, {"entries": [[-1, *ENTRY[1:]]]}),
    "entry with a broken float": (COMMIT, {"entries": [[0, 0.5, b"abc"]]}),
    "scalars with a broken float": (DOWN[6], {"scalars": b"abc"}),
    "final is no bool": (DOWN[10], {"final": 1}),
}


@pytest.mark.parametrize(("message", "changes"), WRONG.values(), ids=WRONG.keys())
def test_a_value_that_the_type_forbids_is_refused(message: Message, changes: dict) -> None:
    decode = m.decode_up if message in UP else m.decode_down
    assert decode(forged(message)) == message
    with pytest.raises(MessageError, match=next(iter(changes))):
        decode(forged(message, **changes))


BODIES = {
    "empty": b"",
    "no map": b"\x01",
    "empty map": b"\x80",
    "trailing byte": GOLDEN[8:] + b"\0",
    "map that promises 4 Gi entries": b"\xdf\xff\xff\xff\xff" + GOLDEN[9:],
    "key that promises 4 GiB": b"\x81\xdb\xff\xff\xff\xfftype",
    "integer as key": b"\x85\x01\x01" + GOLDEN[9:],
    "invalid UTF-8": b"\x83\xa4type\xa5leave\xa5epoch\x01\xa6reason\xa2\xff\xfe",
    "extension type": b"\xc7\x04\x01type",
    "deep nesting": b"\x91" * 500_000,
    "deep nesting as a value": b"\x82\xa4type\xa4join\xa5epoch" + b"\x91" * 500_000,
    "deep nesting under an unknown key": b"\x82\xa4type\xa4join\xa1x" + b"\x91" * 500_000,
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_malformed_body_is_refused_though_its_checksum_is_right(body: bytes) -> None:
    for decode in (m.decode_up, m.decode_down):
        with pytest.raises(MessageError):
            decode(sealed(body))


def test_another_magic_is_refused() -> None:
    with pytest.raises(MessageError, match="MUSF"):
        m.decode_up(b"MUSF" + GOLDEN[4:])


def test_the_size_cap_holds_on_both_sides() -> None:
    scalars = bytes(m.MAX_CONTROL_BYTES // 4 * 4)
    empty = len(m.encode(m.Scalars(run=1, round=2, scalars=b""))) + 3  # a longer length field
    fits = m.Scalars(run=1, round=2, scalars=scalars[: (m.MAX_CONTROL_BYTES - empty) // 4 * 4])
    assert m.decode_down(m.encode(fits)) == fits
    with pytest.raises(MessageError, match="cap"):
        m.encode(m.Scalars(run=1, round=2, scalars=scalars))
    with pytest.raises(MessageError, match="exceeds"):
        m.decode_down(forged(fits, scalars=scalars))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
    | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)  # fmt: skip
BODY = st.binary(max_size=200) | JUNK.map(msgspec.msgpack.encode)
FUZZ = settings(max_examples=150, deadline=None, database=None, derandomize=True)


@FUZZ
@given(BODY)
def test_random_bytes_raise_nothing_but_protocol_errors(body: bytes) -> None:
    """With no envelope, with a magic alone, and behind a valid envelope."""
    for payload in (body, b"MUSC" + body, sealed(body)):
        for decode in (m.decode_up, m.decode_down):
            with contextlib.suppress(ProtocolError):
                decode(payload)


@FUZZ
@given(st.sampled_from(EVERY), st.data())
def test_random_fields_raise_nothing_but_protocol_errors(
    sample: tuple[Decode, Message], data: st.DataObject
) -> None:
    """Most of these get past every check but one."""
    decode, message = sample
    name = data.draw(st.sampled_from(sorted(fields(message))))
    with contextlib.suppress(ProtocolError):
        decode(forged(message, **{name: data.draw(JUNK)}))
