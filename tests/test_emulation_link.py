"""Links of emulated devices: rate, latency, loss, and what a proxy must not break."""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import closing

import pytest

from emulation.link import LinkShape, Way, shaped_links
from wire_protocol.mqtt import Address

UP = 200_000


def way(bits_s=1e6, latency_s=0.0, loss=0.0, seed=0):
    return Way(bits_s, latency_s, loss, random.Random(seed))


class TestWay:
    def test_takes_its_rate_and_latency(self):
        assert way(latency_s=0.25).arrives_s(10.0, 125_000) == pytest.approx(11.25)

    def test_pieces_queue_up(self):
        one = way()
        assert [one.arrives_s(0.0, 12_500) for _ in range(3)] == pytest.approx([0.1, 0.2, 0.3])
        assert one.arrives_s(5.0, 12_500) == pytest.approx(5.1)

    def test_losses_hold_up_what_follows_and_never_reorder(self):
        lossy, clean = way(latency_s=0.05, loss=0.1, seed=3), way(latency_s=0.05)
        with_loss = [lossy.arrives_s(0.0, 1460) for _ in range(200)]
        without = [clean.arrives_s(0.0, 1460) for _ in range(200)]
        assert with_loss == sorted(with_loss)
        held_up = [late - early for late, early in zip(with_loss, without, strict=True)]
        assert max(held_up) > 0.1  # a round trip
        assert held_up[-1] > 5 * 8 * 1460 / 1e6  # about 20 segments went twice
        again = way(latency_s=0.05, loss=0.1, seed=3)
        assert [again.arrives_s(0.0, 1460) for _ in range(200)] == with_loss


def transfer_s(shape, size_bytes, *, up):
    """Seconds that bytes need through a link between two sockets."""
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = Address("127.0.0.1", listening.getsockname()[1])
        with shaped_links([shape], address, 0) as ways, socket.create_connection(ways[0]) as near:
            far, _ = listening.accept()
            with far:
                sender, receiver = (near, far) if up else (far, near)
                payload = random.Random(1).randbytes(size_bytes)
                begin_s = time.monotonic()
                sending = threading.Thread(target=sender.sendall, args=(payload,))
                sending.start()
                received = bytearray()
                while len(received) < size_bytes:
                    received += receiver.recv(1 << 16)
                end_s = time.monotonic()
                sending.join()
                assert received == payload
    return end_s - begin_s


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_200_kilobytes_at_1_megabit_take_1_6_seconds(up):
    # A busy machine can only add: the best of three is the link's own time.
    taken_s = min(transfer_s(LinkShape(1e6, 1e6), UP, up=up) for _ in range(3))
    assert taken_s == pytest.approx(1.6, rel=0.1)


def test_both_ways_have_their_own_rate():
    shape = LinkShape(up_bits_s=1e6, down_bits_s=1e7)
    assert transfer_s(shape, 50_000, up=True) > 3 * transfer_s(shape, 50_000, up=False)


def test_without_a_broker_the_device_is_turned_away():
    with closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = Address("127.0.0.1", nobody.getsockname()[1])
        with (
            shaped_links([LinkShape(1e6, 1e6)], address, 0) as ways,
            socket.create_connection(ways[0], timeout=10.0) as near,
        ):
            assert near.recv(1) == b""


def test_an_end_of_either_side_reaches_the_other():
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = Address("127.0.0.1", listening.getsockname()[1])
        with shaped_links([LinkShape(1e7, 1e7, 0.01)] * 2, address, 0) as ways:
            for near_ends in (True, False):
                near = socket.create_connection(ways[near_ends], timeout=10.0)
                far, _ = listening.accept()
                far.settimeout(10.0)
                with near, far:
                    first, second = (near, far) if near_ends else (far, near)
                    first.sendall(b"last words")
                    first.shutdown(socket.SHUT_RDWR)
                    heard = b""
                    while piece := second.recv(100):
                        heard += piece
                    assert heard == b"last words"
