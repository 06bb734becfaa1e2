"""Fetching a blob in chunks, whatever the broker loses, repeats or reorders."""

from __future__ import annotations

import pytest

from edge_client.blobs import WINDOW, BlobFetch
from wire_protocol.manifest import sha256
from wire_protocol.messages import CHUNK_BYTES, Chunk, Fetch

BLOB = b"".join(i.to_bytes(4, "big") for i in range((2 * WINDOW + 3) * CHUNK_BYTES // 4)) + b"end"
COUNT = 2 * WINDOW + 4
DIGEST = sha256(BLOB)


def chunk(index: int, blob: bytes = BLOB) -> Chunk:
    return Chunk(DIGEST, index, blob[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])


def answer(fetch: BlobFetch, request: Fetch | None, blob: bytes = BLOB) -> None:
    assert request is not None
    for index in range(request.first, request.first + request.count):
        assert fetch.take(chunk(index, blob))


def test_a_blob_comes_in_windows() -> None:
    fetch = BlobFetch(DIGEST, len(BLOB))
    requests = []
    while (request := fetch.next_request()) is not None:
        requests.append(request)
        assert fetch.next_request() is None  # this window is outstanding
        assert not fetch.complete
        answer(fetch, request)
    assert requests == [
        Fetch(DIGEST, 0, WINDOW), Fetch(DIGEST, WINDOW, WINDOW), Fetch(DIGEST, 2 * WINDOW, 4),
    ]  # fmt: skip
    assert fetch.complete
    assert fetch.assemble() == BLOB


def test_the_next_window_is_asked_for_only_when_this_one_is_whole() -> None:
    fetch = BlobFetch(DIGEST, len(BLOB))
    fetch.next_request()
    for index in reversed(range(WINDOW)):
        assert fetch.next_request() is None
        fetch.take(chunk(index))
    assert fetch.next_request() == Fetch(DIGEST, WINDOW, WINDOW)


def test_a_lost_chunk_is_asked_for_again_after_a_restart() -> None:
    fetch = BlobFetch(DIGEST, len(BLOB))
    fetch.next_request()
    for index in range(WINDOW):
        if index != 5:
            fetch.take(chunk(index))
    assert fetch.next_request() is None
    fetch.restart()
    request = fetch.next_request()
    assert request is not None
    assert request.first == 5
    while request is not None:
        for index in range(request.first, request.first + request.count):
            fetch.take(chunk(index))
        request = fetch.next_request()
    assert fetch.assemble() == BLOB


def test_a_restart_after_everything_came_asks_for_nothing() -> None:
    fetch = BlobFetch(sha256(b"x"), 1)
    fetch.next_request()
    fetch.take(Chunk(sha256(b"x"), 0, b"x"))
    fetch.restart()
    assert fetch.next_request() is None
    assert fetch.assemble() == b"x"


def test_a_blob_with_a_wrong_digest_is_forgotten_and_fetched_anew() -> None:
    fetch = BlobFetch(DIGEST, len(BLOB))
    altered = BLOB[:-1] + b"?"
    while (request := fetch.next_request()) is not None:
        answer(fetch, request, altered)
    assert fetch.assemble() is None
    assert not fetch.complete
    while (request := fetch.next_request()) is not None:
        answer(fetch, request)
    assert fetch.assemble() == BLOB


def test_an_empty_blob_is_complete_at_once() -> None:
    fetch = BlobFetch(sha256(b""), 0)
    assert fetch.complete
    assert fetch.next_request() is None
    assert fetch.assemble() == b""


FOREIGN = {
    "another digest": Chunk(sha256(b"other"), 0, BLOB[:CHUNK_BYTES]),
    "beyond the end": Chunk(DIGEST, COUNT, b"x"),
    "short": Chunk(DIGEST, 0, BLOB[: CHUNK_BYTES - 1]),
    "empty": Chunk(DIGEST, 0, b""),
    "long": Chunk(DIGEST, 0, BLOB[: CHUNK_BYTES + 1]),
    "last, too long": Chunk(DIGEST, COUNT - 1, BLOB[:CHUNK_BYTES]),
    "last, too short": Chunk(DIGEST, COUNT - 1, b"en"),
    "repeat": chunk(1),
}


@pytest.mark.parametrize("wrong", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_chunk_that_does_not_belong_is_ignored(wrong: Chunk) -> None:
    fetch = BlobFetch(DIGEST, len(BLOB))
    assert fetch.take(chunk(1))
    assert not fetch.take(wrong)
    while (request := fetch.next_request()) is not None:
        for index in range(request.first, request.first + request.count):
            fetch.take(chunk(index))
    assert fetch.assemble() == BLOB
