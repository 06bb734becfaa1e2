"""Meters in the lab's network: a plain socket, bounded in time and size, to local addresses only.

A device must not be made to talk to the world by a meter's address.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import termios
import time
import tty
from typing import Final

from edge_client.errors import MeterError

_MAX_ANSWER: Final = 64 << 10
_MAX_DIGITS: Final = 9


def local_address(host: str, port: int) -> tuple[str, int]:
    """The address of a host, which has to be private, link-local or this one. Raises MeterError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, OverflowError) as error:  # of names and ports that are none
        why = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise MeterError(f"meter {host}: unknown host ({why})") from error
    address = str(found[0][4][0])
    ip = ipaddress.ip_address(address.partition("%")[0])
    if not (ip.is_private or ip.is_loopback or ip.is_link_local) or ip.is_unspecified:
        raise MeterError(f"meter {host}: {ip} is not a local address; meters are asked there only")
    return address, port


def open_tcp(host: str, port: int, timeout_s: float = 5.0) -> int:
    """A connected, non-blocking descriptor. Raises MeterError."""
    try:
        connection = socket.create_connection(local_address(host, port), timeout_s)
    except OSError as error:
        raise MeterError(f"meter {host}:{port}: {error.strerror or error}") from error
    connection.setblocking(False)
    return connection.detach()


def open_serial(path: str, baud: int) -> int:
    """A serial port in raw mode, non-blocking. Raises MeterError."""
    speed = getattr(termios, f"B{baud}", None)
    if speed is None:
        raise MeterError(f"meter {path}: {baud} baud is none; usual are 9600 and 115200")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise MeterError(f"meter {path}: {error.strerror}") from error
    try:
        tty.setraw(handle)
        attributes = termios.tcgetattr(handle)
        attributes[4] = attributes[5] = speed
        termios.tcsetattr(handle, termios.TCSANOW, attributes)
    except termios.error as error:
        os.close(handle)
        raise MeterError(f"meter {path}: not a serial port ({error.args[-1]})") from error
    return handle


def http_get(address: tuple[str, int], host: str, path: str, timeout_s: float) -> bytes:
    """The body of an answer with status 200, all of it within `timeout_s`. Raises MeterError.

    HTTP/1.0 by hand: no redirects, no proxies, no more than 64 KiB.
    """
    where = f"meter http://{host}:{address[1]}{path}"
    deadline_s = time.monotonic() + timeout_s
    request = f"GET {path} HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    answer = b""
    try:
        with socket.create_connection(address, timeout_s) as connection:
            connection.sendall(request.encode("ascii"))
            while not _complete(answer):
                # A millisecond is left to an answer that is late already: then it times out.
                connection.settimeout(max(1e-3, deadline_s - time.monotonic()))
                octets = connection.recv(4096)
                answer += octets
                if not octets:
                    break
                if len(answer) > _MAX_ANSWER:
                    raise MeterError(f"{where}: an answer of more than {_MAX_ANSWER >> 10} KiB")
    except TimeoutError as error:
        raise MeterError(f"{where}: no answer within {timeout_s:g} s") from error
    except OSError as error:
        raise MeterError(f"{where}: {error.strerror or error}") from error
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n")[0].split()
    if len(status) < 2 or status[1] != b"200":
        said = b" ".join(status[1:]).decode("ascii", "replace")[:60] or "nothing"
        raise MeterError(f"{where}: answered {said}")
    return body


def _complete(answer: bytes) -> bool:
    """Whether as much is here as the answer's Content-Length promises; not known without one."""
    head, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        return False
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        length = value.strip()[:_MAX_DIGITS]  # more than is taken is more with any digits
        if name.strip().lower() == b"content-length" and length.isdigit():
            return len(body) >= int(length)
    return False
