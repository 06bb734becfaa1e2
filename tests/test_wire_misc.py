"""Topics, the estimator's arithmetic, and manifests."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from wire_protocol.directions import DirectionGenerator, DirectionId, Stream
from wire_protocol.errors import InputError
from wire_protocol.estimator import Term, apply_terms, client_terms, server_terms, step_scale
from wire_protocol.manifest import (
    MAX_MANIFEST_BYTES,
    Blob,
    InputSpec,
    Transform,
    check_blob,
    parse_manifest,
    prepare_input,
    same_shape,
    sha256,
)
from wire_protocol.messages import Commit, Entry
from wire_protocol.topics import Topics, Uplink, check_name

TOPICS = Topics("lab")


@pytest.mark.parametrize("name", ["a", "9", "pi-1", "shard.000_B", "x" * 64])
def test_names_that_fit_a_topic_and_a_file(name: str) -> None:
    assert check_name(name, "--id") == name
    assert TOPICS.parse_uplink(TOPICS.control(name)) == Uplink(name, is_frame=False)
    assert TOPICS.parse_uplink(TOPICS.frame(name)) == Uplink(name, is_frame=True)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "-x", "_x", "a/b", "+", "a+", "#", "a#", "a b", "a\n", "\0", "é", "\u0661",
     "x" * 65],
)  # fmt: skip
def test_names_that_could_escape_a_topic_or_a_folder_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="--id"):
        check_name(name, "--id")
    assert TOPICS.parse_uplink(f"musplit/1/lab/dev/{name}/up/control") is None


def test_topics_are_those_of_the_protocol() -> None:
    """Access lists of brokers are written against these."""
    assert TOPICS.broadcast == "musplit/1/lab/bcast"
    assert TOPICS.down("pi") == "musplit/1/lab/dev/pi/down"
    assert TOPICS.control("pi") == "musplit/1/lab/dev/pi/up/control"
    assert TOPICS.frame("pi") == "musplit/1/lab/dev/pi/up/frame"
    assert TOPICS.all_uplinks == (
        "musplit/1/lab/dev/+/up/control", "musplit/1/lab/dev/+/up/frame"
    )  # fmt: skip


@pytest.mark.parametrize(
    "topic",
    [
        "", "musplit/1/lab/bcast", "musplit/1/lab/dev/pi/down", "musplit/1/lab/dev/pi/up",
        "musplit/1/lab/dev/pi/up/control/x", "musplit/1/lab/dev/pi/up/other",
        "musplit/1/lab/dev/pi/down/control", "musplit/1/lab/dev/pi/x/up/frame",
        "musplit/1/lab2/dev/pi/up/frame", "musplit/2/lab/dev/pi/up/frame",
        "/musplit/1/lab/dev/pi/up/frame", "musplit/1/lab/dev/pi/up/frame/",
        "MUSPLIT/1/lab/dev/pi/up/frame",
    ],
)  # fmt: skip
def test_other_topics_are_no_uplinks(topic: str) -> None:
    assert TOPICS.parse_uplink(topic) is None


# -- estimator ------------------------------------------------------------------------------------


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


COMMIT = Commit(
    run=1, round=4, eta_c=0.5, eta_g=2.0,
    entries=[
        Entry(0, 0.25, floats(1.0, -3.0)), Entry(3, 0.0, b""), Entry(7, 0.75, floats(0.1, 0.3)),
    ],
)  # fmt: skip


def test_step_scale_is_the_mean_two_point_estimate() -> None:
    """eta * weight / (K * 2 lam): delta / (2 lam) is the slope along one direction."""
    assert step_scale(0.5, 0.01, 4) == 0.5 / (4 * 2 * 0.01)
    assert step_scale(0.5, 0.01, 4, weight=0.25) == 0.25 * 0.5 / (4 * 2 * 0.01)


def test_client_terms_go_by_entry_then_k_and_step_down_the_slope() -> None:
    terms = list(client_terms(9, 0.01, COMMIT))
    assert [(t.direction.device, t.direction.k) for t in terms] == [(0, 0), (0, 1), (7, 0), (7, 1)]
    assert {t.direction._replace(device=0, k=0) for t in terms} == {
        DirectionId(9, Stream.CLIENT_HALF, 0, 4, 0, 0)
    }
    want = [-0.5 * 2 * weight / 0.04 * delta
            for weight, delta in [(0.25, 1.0), (0.25, -3.0), (0.75, 0.1), (0.75, 0.3)]]  # fmt: skip
    np.testing.assert_allclose([t.scale for t in terms], want, rtol=1e-6)
    # A scalar is the float32 that was sent, exactly.
    assert terms[2].scale == -step_scale(0.5, 0.01, 2, 2.0 * 0.75) * float(np.float32(0.1))


def test_server_terms_go_by_step_then_k() -> None:
    terms = list(server_terms(9, 3, 4, [[1.0, 2.0], [-4.0, 8.0]], 0.5))
    assert [(t.direction.step, t.direction.k, t.scale) for t in terms] == [
        (0, 0, -0.5), (0, 1, -1.0), (1, 0, 2.0), (1, 1, -4.0),
    ]  # fmt: skip
    assert {t.direction._replace(step=0, k=0) for t in terms} == {
        DirectionId(9, Stream.SERVER_HALF, 3, 4, 0, 0)
    }


def random_terms(count: int) -> list[Term]:
    scales = np.random.default_rng(3).standard_normal(count).tolist()
    origin = DirectionId(5, Stream.CLIENT_HALF, 0, 1, 0, 0)
    return [Term(origin._replace(k=k), scale) for k, scale in enumerate(scales)]


def applied(terms: list[Term]) -> bytes:
    weights = np.random.default_rng(4).standard_normal(3001).astype(np.float32)
    apply_terms(weights, terms, DirectionGenerator())
    return weights.tobytes()


def test_apply_terms_is_a_loop_of_float32_additions() -> None:
    terms = random_terms(12)
    generator = DirectionGenerator()
    want = np.random.default_rng(4).standard_normal(3001).astype(np.float32).tolist()
    for term in terms:
        signs = generator.signs(term.direction, 0, len(want)).tolist()
        addend = np.float32(term.scale)
        pairs = zip(want, signs, strict=True)
        want = [np.float32(w) + (addend if sign > 0 else -addend) for w, sign in pairs]
    assert applied(terms) == np.array(want, np.float32).tobytes()


def test_the_order_of_terms_fixes_the_bits() -> None:
    terms = random_terms(12)
    assert applied(terms) == applied(terms)
    assert applied(terms) != applied(terms[::-1])


# -- manifest -------------------------------------------------------------------------------------

GRAPH, WEIGHTS = b"graph", bytes(range(36))


def manifest(**changes: Any) -> dict[str, Any]:
    tensors = [
        tensor("a", [2, 2], 0), tensor("b", [3], 16),
        tensor("c", [], 28, dtype="int64", kind="buffer"),
    ]  # fmt: skip
    return {
        "format": "musplit-bundle/1", "model": "mlp", "cut": "fc1", "classes": 10, "opset": 18,
        "graph": {"sha256": sha256(GRAPH), "size_bytes": len(GRAPH)},
        "weights": {"sha256": sha256(WEIGHTS), "size_bytes": len(WEIGHTS)},
        "parameters": 7, "tensors": tensors,
        "inputs": [{"name": "x", "raw_shape": [2, 2], "shape": [1, 2, 2], "dtype": "float32",
                    "transform": {"mean": [0.5], "std": [2.0]}}],
        "activation": {"name": "h", "shape": [3], "dtype": "float32"},
        "parity_max_relative_error": 0.0, "versions": {"torch": "2"},
    } | changes  # fmt: skip


def tensor(
    name: str, shape: list[int], offset: int, dtype: str = "float32", kind: str = "parameter"
) -> dict[str, Any]:
    return {"name": name, "shape": shape, "dtype": dtype, "offset_bytes": offset, "kind": kind}


def packed(**changes: Any) -> bytes:
    return json.dumps(manifest(**changes)).encode()


def with_tensors(*tensors: dict[str, Any], parameters: int = 7) -> dict[str, Any]:
    return {"tensors": list(tensors), "parameters": parameters}


def with_input(**changes: Any) -> dict[str, Any]:
    return {"inputs": [manifest()["inputs"][0] | changes]}


A, B, C = manifest()["tensors"]
LIES = {
    "gap": with_tensors(A, B | {"offset_bytes": 20}, C | {"offset_bytes": 32}),
    "overlap": with_tensors(A, B | {"offset_bytes": 12}, C),
    "does not start at 0": with_tensors(A | {"offset_bytes": 4}, B, C),
    "negative offset": with_tensors(A | {"offset_bytes": -16}, B, C),
    "buffer first": with_tensors(
        C | {"offset_bytes": 0}, A | {"offset_bytes": 8}, B | {"offset_bytes": 24}
    ),
    "buffer between": with_tensors(
        A, C | {"offset_bytes": 16}, B | {"offset_bytes": 24}
    ),
    "one tensor too few": with_tensors(A, B),
    "one tensor too many": with_tensors(A, B, C, C | {"offset_bytes": 36}),
    "parameters too few": {"parameters": 6},
    "parameters too many": {"parameters": 9},
    "integer parameter": with_tensors(
        A, B, C | {"kind": "parameter"}, parameters=9
    ),
    "negative size": with_tensors(A | {"shape": [2, -2]}, B, C),
    "another dtype": with_tensors(A | {"dtype": "float16"}, B, C),
    "another format": {"format": "musplit-bundle/2"},
    "unknown field": {"surprise": 1},
    "one class": {"classes": 1},
    "enormous blob": {"weights": {"sha256": sha256(WEIGHTS), "size_bytes": (4 << 30) + 1}},
    "digest with a line end": {"graph": {"sha256": sha256(GRAPH) + "\n", "size_bytes": 5}},
    "six dimensions": with_input(shape=[1] * 6),
    "empty input": with_input(shape=[0]),
    "mean of another size": with_input(transform={"mean": [1.0, 2.0], "std": [1.0]}),
    "std of another size": with_input(transform={"mean": [1.0], "std": [1.0] * 3}),
    "pool that does not divide": with_input(transform={"pool": 3}),
    "pool that leaves too few": with_input(transform={"pool": 2}),
    "integers with a transform": with_input(dtype="int64"),
    "no input": {"inputs": []},
}  # fmt: skip


def test_an_honest_manifest_is_accepted() -> None:
    assert [t.size_bytes for t in parse_manifest(packed(), "here").tensors] == [16, 12, 8]
    per_element = with_input(transform={"mean": [1.0] * 4, "std": [1.0] * 4})
    assert parse_manifest(packed(**per_element), "here").inputs[0].transform.mean == [1.0] * 4


@pytest.mark.parametrize("changes", LIES.values(), ids=LIES.keys())
def test_a_manifest_that_lies_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^bundle/manifest\.json: ") as caught:
        parse_manifest(packed(**changes), "bundle/manifest.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": "\xff"}', b"[" * 100_000, packed()[:-1],
     packed() + b"x", b" " * (MAX_MANIFEST_BYTES + 1)],
    ids=range(10),
)  # fmt: skip
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^here: "):
        parse_manifest(data, "here")


def test_truncated_and_altered_blobs_are_told_apart() -> None:
    blob = Blob(sha256(WEIGHTS), len(WEIGHTS))
    check_blob(WEIGHTS, blob, "weights.bin")
    for wrong in (WEIGHTS[:-1], WEIGHTS + b"\0", b""):
        with pytest.raises(InputError, match=r"^weights\.bin: .*truncated"):
            check_blob(wrong, blob, "weights.bin")
    with pytest.raises(InputError, match=r"^weights\.bin: digest differs"):
        check_blob(b"\1" + WEIGHTS[1:], blob, "weights.bin")


def test_a_sample_is_transformed_in_float32_and_given_the_graphs_shape() -> None:
    x = np.array([[[0, 255], [51, 102]]], np.uint8)
    one = InputSpec("x", [2, 2], [1, 2, 2], "float32", Transform(mean=[51.0], std=[102.0]))
    each = InputSpec(
        "x", [4], [4], "float32", Transform(mean=[0.0, 255.0, 50.0, 0.0], std=[1.0, 1.0, 2.0, 3.0])
    )
    got = prepare_input(x, one)
    assert (got.dtype, got.shape) == (np.float32, (1, 1, 2, 2))
    assert got.ravel().tolist() == [-0.5, 2.0, 0.0, 0.5]
    assert prepare_input(x, each).tolist() == [[0.0, 0.0, 0.5, 34.0]]


@pytest.mark.parametrize(
    ("have", "want"),
    [((28, 28), [1, 28, 28]), ((1, 28, 28), [28, 28]), ((64,), [64]), ((), [1])],
)
def test_sample_shapes_are_the_same_up_to_dimensions_of_1(
    have: tuple[int, ...], want: list[int]
) -> None:
    assert same_shape(have, want)


@pytest.mark.parametrize(
    ("have", "want"),
    [((28, 28), [784]), ((3, 28), [28, 3]), ((2,), []), ((2,), [2, 2])],
)
def test_sample_shapes_that_differ(have: tuple[int, ...], want: list[int]) -> None:
    assert not same_shape(have, want)


_FAULTS = """
import resource, sys
from wire_protocol.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print(0, "no glibc")
    sys.exit()
def both():
    return [bytes(b"x") * (2 << 20), bytes(b"y") * (2 << 20)]
both()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    both()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept_for_what_comes_next() -> None:
    """Otherwise each of these 80 MB would be taken anew, page by page."""
    run = [sys.executable, "-c", _FAULTS, "keep"]
    faults = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    assert int(faults[0]) < 2000
