"""What the HTTP endpoint serves: ``/healthz``, ``/readyz`` and ``/metrics``. A new path gets a case here."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Final, NamedTuple

import trio

from realtimed.http.metrics import CONTENT_TYPE

__all__ = ["Answer", "Routes", "sentence"]

_SHARE: Final = 0.05
"""The part of the time that rendering metrics may use. Faster requests get the cached page."""

_TEXT: Final = "text/plain; charset=utf-8"


class Answer(NamedTuple):
    """A status and a body."""

    status: HTTPStatus
    body: bytes
    content_type: str = _TEXT
    headers: tuple[tuple[str, str], ...] = ()


def sentence(status: HTTPStatus, text: str, *headers: tuple[str, str]) -> Answer:
    """Return an answer that is a sentence."""
    return Answer(status, text.encode() + b"\n", headers=headers)


class Routes:
    """The answers to requests.

    `ready` returns a clause that says why new clients cannot be served, or None. `metrics` renders the metrics page.
    """

    def __init__(self, ready: Callable[[], str | None], metrics: Callable[[], bytes]) -> None:
        self._ready = ready
        self._make_metrics = metrics
        self._metrics = b""
        self._stale_at = -1.0

    def answer(self, method: bytes, target: bytes) -> Answer:
        """Return the answer to a request."""
        if method not in (b"GET", b"HEAD"):
            return sentence(HTTPStatus.METHOD_NOT_ALLOWED, "There are only GET and HEAD.", ("Allow", "GET, HEAD"))
        match target.partition(b"?")[0]:
            case b"/healthz":
                return sentence(HTTPStatus.OK, "ok")
            case b"/readyz":
                obstacle = self._ready()
                if obstacle is None:
                    return sentence(HTTPStatus.OK, "ready")
                return sentence(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {obstacle}")
            case b"/metrics":
                return Answer(HTTPStatus.OK, self._page(), CONTENT_TYPE)
        return sentence(HTTPStatus.NOT_FOUND, "There are /healthz, /readyz and /metrics.")

    def _page(self) -> bytes:
        began = trio.current_time()
        if began >= self._stale_at:
            self._metrics = self._make_metrics()
            ended = trio.current_time()
            self._stale_at = ended + (ended - began) / _SHARE
        return self._metrics
