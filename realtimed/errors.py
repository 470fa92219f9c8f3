"""Every exception that realtimed raises on purpose.

    RealtimeError
    ├── ConfigurationError     an option is wrong; the daemon does not start
    ├── NoDaemonError          nothing answers on the control socket
    ├── RequestTimeoutError    the daemon did not answer in time; it may still carry the request out
    ├── RefusedError           the daemon understood and said no; `code` is for programs
    └── ProtocolError          the other side does not speak the protocol, or broke off in the middle

A caller that catches `RealtimeError` has caught them all.
"""

from collections.abc import Iterator

__all__ = [
    "ConfigurationError",
    "NoDaemonError",
    "ProtocolError",
    "RealtimeError",
    "RefusedError",
    "RequestTimeoutError",
    "printable",
    "quoted",
]


class RealtimeError(Exception):
    """The root of all exceptions raised by realtimed."""


class ConfigurationError(RealtimeError):
    """A setting is wrong. The text names the option and says what would be right."""


class NoDaemonError(RealtimeError):
    """No daemon could be reached at the control socket. The text names the path and what to look at."""


class RequestTimeoutError(RealtimeError):
    """The daemon did not answer within the timeout.

    A request that timed out may nevertheless have been carried out.
    """


class RefusedError(RealtimeError):
    """A request was understood and refused.

    `code` is one word for programs, such as ``invalid_channel``; `message` is a sentence for people. The codes
    are listed in ``docs/protocol.md``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} ({self.code})"


class ProtocolError(RealtimeError):
    """The peer sent what the protocol does not allow, or the connection broke in the middle of an answer."""


def printable(text: str) -> str:
    """Return `text` on one line and with no power over a terminal: what is not printable comes out escaped."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def quoted(value: object, limit: int = 60) -> str:
    """Return `value` as it may stand in an error or a log line.

    Control characters, terminal escapes, characters that turn the direction of writing, lone surrogates and what else
    `str.isprintable` denies come out escaped, and no more than about `limit` characters of a string or of bytes.
    """
    if isinstance(value, (str, bytes)) and len(value) > limit:
        return repr(value[:limit]) + "…"
    shown = ""
    for piece in _representation(value, limit):
        shown += piece
        if len(shown) > limit + 2:
            return shown[:limit] + "…"
    return shown


def _representation(value: object, limit: int) -> Iterator[str]:
    """Yield `repr` of a value in pieces. Who stops after `limit` characters spends no time on the rest.

    Each level of a nested value yields at least one character first, so it is not entered any deeper than that.
    """
    match value:
        case str() | bytes():
            yield repr(value[: limit + 3])
        case bool():
            yield repr(value)
        case int() if value.bit_length() > 4 * (limit + 3):
            yield hex(value >> value.bit_length() - 4 * (limit + 3))  # decimal digits would take quadratic time
        case list():
            yield "["
            for number, each in enumerate(value):
                if number:
                    yield ", "
                yield from _representation(each, limit)
            yield "]"
        case dict():
            yield "{"
            for number, (key, each) in enumerate(value.items()):
                yield ", " if number else ""
                yield from _representation(key, limit)
                yield ": "
                yield from _representation(each, limit)
            yield "}"
        case _:
            yield repr(value)
