"""Fetching a blob in chunks to disk, whatever the broker loses, repeats or reorders."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_client.blobs import WINDOW, BlobFetch
from edge_client.errors import StateError
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


@pytest.fixture
def fetch(tmp_path: Path) -> Iterator[BlobFetch]:
    fetch = BlobFetch(DIGEST, len(BLOB), tmp_path / "blob")
    yield fetch
    fetch.discard()


def fetch_all(fetch: BlobFetch, blob: bytes = BLOB) -> None:
    while (request := fetch.next_request()) is not None:
        answer(fetch, request, blob)


def test_a_blob_comes_in_windows(fetch: BlobFetch) -> None:
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
    assert fetch.finish()
    assert fetch.path.read_bytes() == BLOB


def test_the_beginning_of_a_finished_blob_is_read_into_a_buffer(fetch: BlobFetch) -> None:
    fetch_all(fetch)
    buffer = np.zeros(len(BLOB) - 5, np.uint8)
    assert fetch.finish(buffer)
    assert buffer.tobytes() == BLOB[:-5]


def test_the_next_window_is_asked_for_only_when_this_one_is_whole(fetch: BlobFetch) -> None:
    fetch.next_request()
    for index in reversed(range(WINDOW)):
        assert fetch.next_request() is None
        fetch.take(chunk(index))
    assert fetch.next_request() == Fetch(DIGEST, WINDOW, WINDOW)


def test_a_lost_chunk_is_asked_for_again_after_a_restart(fetch: BlobFetch) -> None:
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
    assert fetch.finish()
    assert fetch.path.read_bytes() == BLOB


def test_a_restart_after_everything_came_asks_for_nothing(tmp_path: Path) -> None:
    fetch = BlobFetch(sha256(b"x"), 1, tmp_path / "x")
    fetch.next_request()
    fetch.take(Chunk(sha256(b"x"), 0, b"x"))
    fetch.restart()
    assert fetch.next_request() is None
    assert fetch.finish()


def test_a_blob_with_a_wrong_digest_is_forgotten_and_fetched_anew(fetch: BlobFetch) -> None:
    fetch_all(fetch, BLOB[:-1] + b"?")
    assert not fetch.finish()
    assert not fetch.complete
    fetch_all(fetch)
    assert fetch.finish()
    assert fetch.path.read_bytes() == BLOB


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES])
def test_a_file_cut_off_on_disk_is_not_taken_for_the_blob(fetch: BlobFetch, size: int) -> None:
    fetch_all(fetch)
    os.truncate(fetch.path, size)
    assert not fetch.finish()
    fetch_all(fetch)
    assert fetch.finish()


def test_a_fetch_begun_anew_takes_nothing_of_an_earlier_one_for_granted(tmp_path: Path) -> None:
    """The program was killed in mid-fetch."""
    first = BlobFetch(DIGEST, len(BLOB), tmp_path / "blob")
    answer(first, first.next_request(), b"?" * len(BLOB))
    again = BlobFetch(DIGEST, len(BLOB), tmp_path / "blob")
    assert again.next_request() == Fetch(DIGEST, 0, WINDOW)
    again.restart()
    fetch_all(again)
    assert again.finish()
    assert again.path.read_bytes() == BLOB
    first.discard()


def test_a_discarded_fetch_leaves_no_file(fetch: BlobFetch) -> None:
    answer(fetch, fetch.next_request())
    fetch.discard()
    fetch.discard()
    assert not fetch.path.exists()


def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "full"
    path.symlink_to("/dev/full")
    fetch = BlobFetch(DIGEST, len(BLOB), path)
    with pytest.raises(StateError, match=r"/full: .*free space") as caught:
        fetch_all(fetch)
    fetch.discard()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_a_size_that_lies_allocates_nothing(tmp_path: Path) -> None:
    """4 GiB announced, 32 KiB come: as much is on disk."""
    fetch = BlobFetch(DIGEST, 4 << 30, tmp_path / "blob")
    assert fetch.next_request() == Fetch(DIGEST, 0, WINDOW)
    assert fetch.take(chunk(0))
    assert not fetch.take(Chunk(DIGEST, (4 << 30) // CHUNK_BYTES - 1, BLOB[:CHUNK_BYTES]))
    fetch.restart()
    assert fetch.path.stat().st_size <= CHUNK_BYTES
    fetch.discard()


def test_an_empty_blob_is_complete_at_once(tmp_path: Path) -> None:
    fetch = BlobFetch(sha256(b""), 0, tmp_path / "blob")
    assert fetch.complete
    assert fetch.next_request() is None
    assert fetch.finish()


FOREIGN = {
    "another digest": Chunk(sha256(b"other"), 0, BLOB[:CHUNK_BYTES]),
    "beyond the window": chunk(WINDOW),
    "beyond the end": Chunk(DIGEST, COUNT, b"x"),
    "short": Chunk(DIGEST, 0, BLOB[: CHUNK_BYTES - 1]),
    "empty": Chunk(DIGEST, 0, b""),
    "long": Chunk(DIGEST, 0, BLOB[: CHUNK_BYTES + 1]),
    "last, too long": Chunk(DIGEST, COUNT - 1, BLOB[:CHUNK_BYTES]),
    "last, too short": Chunk(DIGEST, COUNT - 1, b"en"),
    "repeat": chunk(1),
}


@pytest.mark.parametrize("wrong", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_chunk_that_does_not_belong_is_ignored(fetch: BlobFetch, wrong: Chunk) -> None:
    fetch.next_request()
    assert fetch.take(chunk(1))
    assert not fetch.take(wrong)
    fetch.restart()
    while (request := fetch.next_request()) is not None:
        for index in range(request.first, request.first + request.count):
            fetch.take(chunk(index))
    assert fetch.finish()
    assert fetch.path.read_bytes() == BLOB
