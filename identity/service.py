"""The enrolment service: HTTPS with the authority's certificate, for as long as boards enrol.

Who connects is a stranger: requests are small and bounded, connections few and short, refusals
limited, and every outcome is in the audit log. Tokens and keys are in no log.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import msgspec

from identity.authority import Authority
from identity.errors import EnrolmentError
from identity.exchange import MAX_BYTES, PATH, Answer, Refusal, Request
from identity.files import BROKER_FILE, BROKER_KEY_FILE
from wire_protocol.errors import InputError, MusplitError
from wire_protocol.events import Address
from wire_protocol.messages import printable
from wire_protocol.tls import check_private, load_own

_CONNECTIONS: Final = 16
# A connection is cut after this long, whatever it does.
_CONNECTION_S: Final = 20.0
_SILENCE_S: Final = 8.0
_WINDOW_S: Final = 60.0
_REFUSALS_AN_ADDRESS: Final = 10
_REFUSALS: Final = 100
_ADDRESSES: Final = 1024
_LENGTH: Final = re.compile(r"[0-9]{1,9}")


class RefusalLimit:
    """Counts refusals in the last minute; who guesses tokens has to wait."""

    def __init__(self, an_address: int = _REFUSALS_AN_ADDRESS, in_all: int = _REFUSALS) -> None:
        self._an_address, self._in_all = an_address, in_all
        self._refused: deque[tuple[float, str]] = deque(maxlen=_ADDRESSES)
        self._lock = threading.Lock()

    def reached(self, address: str, now_s: float) -> bool:
        """No more requests of this address are looked at now."""
        with self._lock:
            while self._refused and now_s - self._refused[0][0] > _WINDOW_S:
                self._refused.popleft()
            own = sum(1 for _, who in self._refused if who == address)
            return own >= self._an_address or len(self._refused) >= self._in_all

    def count(self, address: str, now_s: float) -> None:
        """One more refusal."""
        with self._lock:
            self._refused.append((now_s, address))


class EnrolmentService(ThreadingHTTPServer):
    """Answers POST /enroll. Raises InputError when it cannot listen."""

    daemon_threads = True

    def __init__(
        self, authority: Authority, address: Address, say: Callable[[str], None],
        read_unix_s: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        authority.ledger()  # there is an authority
        self.authority, self.say, self.read_unix_s = authority, say, read_unix_s
        self.limit = RefusalLimit()
        key = authority.folder / BROKER_KEY_FILE
        check_private(key)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        load_own(self._context, authority.folder / BROKER_FILE, key)
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)
        if ":" in address.host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((address.host, address.port), _Handler)
        except OSError as error:
            raise InputError(
                f"--listen {address}: cannot listen there ({error.strerror}); give another"
            ) from error

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, when there is one left."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the library's; the slot is free again."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """TLS first: its handshake is the stranger's work too."""
        request.settimeout(_SILENCE_S)
        with (
            contextlib.suppress(OSError),  # strangers who cut, or speak no TLS
            self._context.wrap_socket(
                request, server_side=True, do_handshake_on_connect=False
            ) as stream,
        ):
            cut = threading.Timer(_CONNECTION_S, _cut, (stream,))
            cut.daemon = True
            cut.start()
            try:
                stream.do_handshake()
                super().finish_request(stream, client_address)
            finally:
                cut.cancel()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """One line, not a traceback for every stranger."""
        self.say(f"enrolment: a request of {client_address[0]} failed")


class _Handler(BaseHTTPRequestHandler):
    server: EnrolmentService
    server_version = "musplit"
    sys_version = ""
    protocol_version = "HTTP/1.0"  # one request a connection

    def do_POST(self) -> None:
        """Take a request, answer with a certificate or a reason."""
        service = self.server
        try:
            status, answer = self._decide(service, str(self.client_address[0]))
        except MusplitError as error:  # the authority's folder, a full disk
            service.say(f"enrolment failed: {error}")
            status, answer = HTTPStatus.INTERNAL_SERVER_ERROR, Refusal("see the service's log")
        self._answer(status, answer)

    def _decide(
        self, service: EnrolmentService, address: str
    ) -> tuple[HTTPStatus, Answer | Refusal]:
        now_s = service.read_unix_s()
        if service.limit.reached(address, now_s):
            # A client listens once it has sent all: closing on unread bytes would cut the answer.
            self.rfile.read(self._length())
            return HTTPStatus.TOO_MANY_REQUESTS, Refusal("too many refusals; wait a minute")
        device_id = ""
        try:
            body = self._body()
            device_id = _claimed(body.token)
            enrolment = service.authority.redeem(body.token, body.request.encode(), now_s)
        except EnrolmentError as error:
            service.limit.count(address, now_s)
            service.say(f"refused {device_id or 'a request'} from {address}: {error}")
            service.authority.audit(now_s, "refused", device_id, address=address, reason=str(error))
            return HTTPStatus.FORBIDDEN, Refusal(str(error))
        service.authority.audit(now_s, "enrolled", device_id, address=address)
        service.say(f"enrolled {device_id} from {address}")
        return HTTPStatus.OK, Answer(enrolment.certificate.decode(), enrolment.signer.decode())

    def _body(self) -> Request:
        length = self._length()
        text = self.rfile.read(length)
        if self.path != PATH:
            raise EnrolmentError(f"there is nothing but POST {PATH} here")
        if not length:
            raise EnrolmentError(f"a request has 1 to {MAX_BYTES} bytes, and says how many")
        try:
            return msgspec.json.decode(text, type=Request)
        except ValueError as error:
            raise EnrolmentError("not an enrolment request of this version") from error

    def _length(self) -> int:
        """Bytes of the request's body; 0 when it does not say, or says too many."""
        text = self.headers.get("Content-Length", "")
        length = int(text) if _LENGTH.fullmatch(text) else 0
        return length if length <= MAX_BYTES else 0

    def _answer(self, status: HTTPStatus, answer: Answer | Refusal) -> None:
        body = msgspec.json.encode(answer)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """The service says what matters itself."""


def _claimed(token: str) -> str:
    """Whom a token says it is for, made fit for a log."""
    name, colon, _ = token.partition(":")
    return printable(name)[:64] if colon else ""


def _cut(stream: ssl.SSLSocket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(stream, socket.SHUT_RDWR)
