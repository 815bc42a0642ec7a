"""uvicorn, with connections that have to come to the point, and an end that finishes what was taken."""

from __future__ import annotations

import ipaddress
import json
import signal
import socket
from http import HTTPStatus

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits, Refusal

HEAD_SECONDS = 10.0  #: that a connection may take to send the head of a request
LINGER_SECONDS = 1.0  #: that the rest of a body is thrown away, so that who sends it reads why it is not taken


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int) -> socket.socket:
    """A socket at (host, port), where nobody is served yet; port 0 is a free one.

    Raises:
        OSError: it is taken, or no address of this machine.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except BaseException:
        found.close()
        raise
    return found


def run(app, listening: socket.socket, limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT; what was taken by then is finished and answered."""
    # uvicorn raises a signal again when it is done, for whoever listened before: here nobody is to be killed by it.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config(app, limits)).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def config(app, limits: Limits) -> uvicorn.Config:
    """How uvicorn is to serve `app`."""
    return uvicorn.Config(
        app, http=connection(limits), ws="none", loop="asyncio", lifespan="on", log_level="warning", access_log=False,
        server_header=False, timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.read_seconds + limits.seconds) + 1,
    )  # fmt: skip


def connection(limits: Limits) -> type[H11Protocol]:
    """A protocol that closes connections which do not send the head of a request, or of the next one, in time."""

    class Connection(H11Protocol):
        _late = None

        def connection_made(self, transport):
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self._refuse(Refusal(503, "Overloaded", "too many connections", 1))
            else:
                self._wait_for_a_head(HEAD_SECONDS)

        def data_received(self, data):
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self._stop_waiting()

        def on_response_complete(self):
            before = self.cycle
            super().on_response_complete()
            if self.cycle is before:  # no next request was there already
                self._wait_for_a_head(HEAD_SECONDS if self.conn.their_state is h11.IDLE else LINGER_SECONDS)

        def connection_lost(self, exc):
            self._stop_waiting()
            super().connection_lost(exc)

        def send_400_response(self, msg):
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self._refuse(Refusal(400, "Request", msg))
            else:
                self.transport.close()

        def _wait_for_a_head(self, seconds):
            self._stop_waiting()
            self._late = self.loop.call_later(seconds, self._is_late)

        def _stop_waiting(self):
            if self._late is not None:
                self._late.cancel()

        def _is_late(self):
            if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
                self._refuse(Refusal(408, "Timeout", f"no request within {HEAD_SECONDS:g} s"))
            else:
                self.transport.close()

        def _refuse(self, refusal):
            """An answer to what is no request, or not yet."""
            body = json.dumps(refusal.body()).encode()
            head = f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n"
            head += "Content-Type: application/json\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in refusal.headers().items())
            self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            self.transport.close()

    return Connection
