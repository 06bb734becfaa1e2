"""Links of emulated devices: a TCP proxy before the broker that takes as long as the link would.

A device program connects to its own port, and knows nothing of it. Each way is a queue of bytes:
they leave at the link's rate, arrive a latency later, and in order. A lost TCP segment holds up
what follows for a round trip and its own repetition; a repetition that is lost too, for TCP's
shortest timeout of 0.2 s (RFC 6298 allows 1 s; Linux has 0.2), doubling. Congestion control is not
emulated: on a real link losses also lower the rate.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from wire_protocol.mqtt import Address

LOOPBACK: Final = "127.0.0.1"
_SEGMENT_BYTES: Final = 1460
_SHORTEST_TIMEOUT_S: Final = 0.2
# What is read at once: about this much of the link's time, so that two ways share a rate fairly.
_PIECE_S: Final = 0.005
_LARGEST_PIECE_BYTES: Final = 1 << 18
# What is taken in before it can leave, as by a modem's buffer: a link that is used to the full does
# not pause because this process wakes up late.
_AHEAD_S: Final = 0.1
# Of the kernel, per socket: a sender notices a slow link by what it cannot send.
_BUFFER_BYTES: Final = 1 << 16
_STARTED_S: Final = 10.0


class LinkShape(msgspec.Struct, frozen=True):
    """A link; one way takes latency_s + bits / rate."""

    up_bits_s: Annotated[float, Meta(gt=0)]
    down_bits_s: Annotated[float, Meta(gt=0)]
    latency_s: Annotated[float, Meta(ge=0)] = 0.0
    loss: Annotated[float, Meta(ge=0, le=0.5)] = 0.0  # probability, of a segment


Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]


class Way:
    """One direction of a link: when the bytes that are given to it arrive. No I/O, no clock."""

    def __init__(self, bits_s: float, latency_s: float, loss: float, rng: random.Random) -> None:
        self._bits_s, self._latency_s, self._loss, self._rng = bits_s, latency_s, loss, rng
        self.free_s = 0.0  # when the last of what was given has left
        self._arrived_s = 0.0
        self.piece_bytes = int(
            min(_LARGEST_PIECE_BYTES, max(_SEGMENT_BYTES, bits_s / 8.0 * _PIECE_S))
        )

    def arrives_s(self, now_s: float, size_bytes: int) -> float:
        """Give it bytes at `now_s`."""
        self.free_s = max(now_s, self.free_s) + 8.0 * size_bytes / self._bits_s
        arrives_s = self.free_s + self._latency_s
        if self._loss:
            segments = -(-size_bytes // _SEGMENT_BYTES)
            held_s = max(self._held_up_s() for _ in range(segments))
            arrives_s = max(self.free_s + self._latency_s + held_s, self._arrived_s)
        self._arrived_s = arrives_s
        return arrives_s

    def _held_up_s(self) -> float:
        """How much later one segment comes, which may be lost and lost again."""
        held_s, timeout_s, again_s = 0.0, _SHORTEST_TIMEOUT_S, 2.0 * self._latency_s
        while self._rng.random() < self._loss:
            self.free_s += 8.0 * _SEGMENT_BYTES / self._bits_s
            held_s += again_s
            again_s, timeout_s = timeout_s, 2.0 * timeout_s
        return held_s


@contextlib.contextmanager
def shaped_links(
    shapes: Sequence[LinkShape], broker: Address, seed: int
) -> Iterator[list[Address]]:
    """Give each link an address that leads to the broker; all are closed at the end of the block.

    `seed`: which segments are lost.
    """
    proxies = _Proxies(shapes, broker, seed)
    proxies.start()
    try:
        yield proxies.addresses
    finally:
        proxies.stop()


class _Proxies:
    """The proxies of a fleet, on an event loop in a thread of their own."""

    def __init__(self, shapes: Sequence[LinkShape], broker: Address, seed: int) -> None:
        self._broker = broker
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True, name="links")
        self._listening = [_listen() for _ in shapes]
        self.addresses = [Address(LOOPBACK, s.getsockname()[1]) for s in self._listening]
        self._ways = [
            (
                Way(s.up_bits_s, s.latency_s, s.loss, random.Random(f"{seed} {index} up")),  # noqa: S311 - reproducible
                Way(s.down_bits_s, s.latency_s, s.loss, random.Random(f"{seed} {index} down")),  # noqa: S311 - reproducible
            )
            for index, s in enumerate(shapes)
        ]
        self._ready = threading.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(_STARTED_S)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        servers = [
            self._loop.run_until_complete(
                asyncio.start_server(self._connected(*ways), sock=listening)
            )
            for listening, ways in zip(self._listening, self._ways, strict=True)
        ]
        self._ready.set()
        self._loop.run_forever()
        for server in servers:
            server.close()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self._loop.close()

    def _connected(self, up: Way, down: Way) -> Accept:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                far = await asyncio.open_connection(*self._broker)
            except OSError:  # no broker now: the device sees its connection closed, and tries again
                writer.close()
                return
            await asyncio.gather(
                _pump(reader, far[1], up), _pump(far[0], writer, down), return_exceptions=True
            )

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = self._loop.create_task(serve(reader, writer))
            self._tasks.add(task)  # the loop itself would not keep it alive
            task.add_done_callback(self._tasks.discard)

        return accept


def _listen() -> socket.socket:
    listening = socket.socket()
    # Connections inherit it.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    listening.bind((LOOPBACK, 0))
    return listening


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
    """Carry one way until its sender closes; then close the other end."""
    underway: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    delivering = asyncio.create_task(_deliver(underway, writer))
    loop = asyncio.get_running_loop()
    try:
        while not delivering.done() and (data := await reader.read(way.piece_bytes)):
            underway.put_nowait((way.arrives_s(loop.time(), len(data)), data))
            ahead_s = way.free_s - loop.time()
            if ahead_s > _AHEAD_S:
                await asyncio.sleep(ahead_s - _AHEAD_S)
    finally:
        underway.put_nowait((way.free_s, b""))
        with contextlib.suppress(OSError):
            await delivering


async def _deliver(
    underway: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
) -> None:
    """Write each piece when it has arrived; an empty one is the end."""
    loop = asyncio.get_running_loop()
    try:
        while True:
            arrives_s, data = await underway.get()
            wait_s = arrives_s - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            if not data:
                return
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
