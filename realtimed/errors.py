"""Every exception that callers of realtimed see.

    RealtimeError
    ├── ConfigurationError     an option is wrong; the daemon does not start
    ├── NoDaemonError          nothing answers on the control socket
    ├── RequestTimeoutError    the daemon did not answer in time; it may still carry the request out
    ├── RefusedError           the daemon understood and said no; `code` is for programs
    └── ProtocolError          the other side does not speak the protocol, or broke off in the middle

A caller that catches `RealtimeError` has caught them all.
"""

__all__ = [
    "ConfigurationError",
    "NoDaemonError",
    "ProtocolError",
    "RealtimeError",
    "RefusedError",
    "RequestTimeoutError",
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
