"""Before a request is looked into: who sends it, how much of it, how slowly. Every answer passes here, too."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time

from .limits import Limits, Refusal, invalid
from .metrics import Metrics

#: What a browser may do with our pages: nothing comes from elsewhere.
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


class Door:
    """ASGI middleware: the key, the headers of every answer, what is counted of it."""

    def __init__(self, app, *, key: str | None, open_paths: frozenset[str], paths: frozenset[str], metrics: Metrics):
        """`key` is asked of all but `open_paths`; answers are counted by their path where it is one of `paths`."""
        self._app, self._open, self._paths, self._metrics = app, open_paths, paths, metrics
        self._key = None if key is None else key.encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, path, status = time.monotonic(), scope["path"], [500]
        path = path if path in self._paths else "other"

        async def sent(message):
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            if self._key is not None and scope["path"] not in self._open and not self._knows(scope["headers"]):
                refusal = Refusal(401, "Unauthorized", "a key is needed: send Authorization: Bearer KEY")
                return await answer(refusal, sent)
            await self._app(scope, receive, sent)
        finally:
            self._metrics.requests.labels(path, str(status[0])).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - start)

    def _knows(self, headers):
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"


async def answer(refusal: Refusal, send) -> None:
    """A refusal, sent by hand."""
    body = json.dumps(refusal.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers().items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Bodies:
    """Bodies of requests, all of which have so many bytes to share until they are answered."""

    def __init__(self, limits: Limits):
        self._limits, self.held = limits, 0

    @contextlib.asynccontextmanager
    async def read(self, request):
        """The body of a starlette request; its bytes count until the block is left.

        Raises:
            Refusal: 415 it is no JSON; 413 it is too large, whether it says so or not; 408 it comes too slowly; 429
                there is no room for it.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a browser sends for another site's page without asking is not this
            raise Refusal(415, "Validation", "send JSON, with Content-Type: application/json")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Refusal(415, "Validation", "send the body as it is, without Content-Encoding")
        length = request.headers.get("content-length")
        if length is not None and int(length) > self._limits.body:  # that it is a number h11 has seen to
            raise self._large()
        held = [0]
        try:
            coming = self._whole(request, held)
            try:
                body = await asyncio.wait_for(coming, self._limits.read_seconds)
            except (TimeoutError, asyncio.TimeoutError):
                said = f"the body took longer than {self._limits.read_seconds:g} s"
                raise Refusal(408, "Timeout", said) from None
            yield body
        finally:
            self.held -= held[0]

    async def _whole(self, request, held):
        parts = bytearray()
        async for part in request.stream():
            if len(parts) + len(part) > self._limits.body:
                raise self._large()
            if self.held + len(part) > self._limits.bodies:
                raise Refusal(429, "Overloaded", "too many bytes of other requests wait; try again", 1)
            held[0] += len(part)
            self.held += len(part)
            parts += part
        return bytes(parts)

    def _large(self):
        return invalid(f"the body is too large; at most {self._limits.body} bytes are taken", 413)
