"""The daemon with a protocol that says back what it hears, for a suite of tests that expects an echo server.

`python -m tests.system.echo_daemon OPTIONS…` takes the options of `realtimed`. Only what is said differs: `Echo`
stands where the plain protocol stands. Listener, handshake, stream, meter, trio-websocket and session are the
daemon's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from realtimed.cli.realtimed import main
from realtimed.hub.publication import Frames, WireFormat
from realtimed.websocket import arrival
from realtimed.websocket.frames import binary_frame, text_frame
from realtimed.websocket.protocols import Conversation
from realtimed.websocket.protocols.plain import Plain


class Echo(Conversation):
    """One client, which gets each of its messages back: text as text, binary as binary."""

    __slots__ = ()

    name = ""
    form: ClassVar[WireFormat] = Plain.form

    def receive(self, message: str | bytes) -> Sequence[Frames]:
        return [text_frame(message.encode()) if isinstance(message, str) else binary_frame(message)]


def _choose(_: Iterable[str]) -> type[Conversation]:
    return Echo


if __name__ == "__main__":
    vars(arrival)["choose"] = _choose
    main()
