"""What a request may be, and the answer to one that is refused."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is taken. All of it is looked at before an image is decoded."""

    body: int = 16 << 20  #: bytes of a request
    bodies: int = 256 << 20  #: bytes of all requests that are being read or wait
    pixels: int = 50_000_000  #: of an image, by its header
    text: int = 10_000  #: characters of a text
    pairs: int = 128  #: of a text and an image, in a request
    queue: int = 512  #: pairs that were taken and are not done
    connections: int = 512
    read_seconds: float = 30.0  #: from the first byte of a body to its last
    seconds: float = 60.0  #: from there to the answer


class Refusal(Exception):
    """A request that gets no answer; the message says why and what to do."""

    def __init__(self, status: int, kind: str, message: str, retry_after: int | None = None):
        """`kind` is the `error_type` of the answer, named as by text-embeddings-inference where that has one."""
        super().__init__(message)
        self.status, self.kind, self.retry_after = status, kind, retry_after

    def body(self) -> dict[str, str]:
        return {"error": str(self), "error_type": self.kind}

    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def invalid(message: str, status: int = 422) -> Refusal:
    """What was sent is wrong: 422; or too large: 413."""
    return Refusal(status, "Validation", message)
