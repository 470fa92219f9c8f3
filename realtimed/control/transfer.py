"""What passes from one process's control socket to the next one's: keyed receipts, and all connections of publishers.

Connections go over at the end, when no command is half carried out. What a publisher has sent and is not carried out
yet goes over as bytes, and so do answers that it has not read.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final

import msgspec

from realtimed.control.forms import FORMS
from realtimed.control.idempotency import KeyedReceipts, Known
from realtimed.control.server import Connection
from realtimed.control.service import Service
from realtimed.control.states import Resumed
from realtimed.hub.position import Receipt
from realtimed.net.backlogs import Backlogs
from realtimed.net.fanout import MISSED
from realtimed.net.stream import QueuedStream
from realtimed.net.waiting import Blob, Blobs, ReceivedBlobs, Waiting
from realtimed.process.logs import Event
from realtimed.process.portions import HandOverError, Part, Portion, TakenPortion, decoded
from realtimed.rpc.wire import encode_response

__all__ = ["PublishersPart"]

log = logging.getLogger(__name__)

_AT_ONCE: Final = 500
"""Keys in a portion: a fraction of a millisecond."""


class _Key(msgspec.Struct, array_like=True):
    """The receipts of a command with a key, which is `age` seconds old."""

    channels: str | tuple[str, ...]
    key: str
    age: float
    receipts: list[Receipt]


class _Publisher(msgspec.Struct, array_like=True):
    """A connection. `form` is the index of its form."""

    resumed: Resumed
    form: int
    channels: list[str]
    patterns: list[str]
    waiting: Waiting | None = None


class _Rest(msgspec.Struct):
    """What goes over at the end."""

    keys: list[_Key]
    publishers: list[_Publisher]
    blobs: list[Blob]
    commands: int
    refused: dict[str, int]


class PublishersPart(Part):
    """Hands over publishers, or takes them over. The hub's part comes before this one."""

    # Invariants: until `report`, `_taken` has the connections that have come, each with the id of its request for an
    # upgrade, and `_incomplete` those that have waited for something that is not known here.

    def __init__(self, service: Service, keyed: KeyedReceipts, start: Callable[[Connection], None]) -> None:
        """`start` makes a connection run that was resumed."""
        self._service = service
        self._keyed = keyed
        self._start = start
        self._began = 0.0
        self._taken: list[tuple[Connection, int | None]] = []
        self._incomplete: list[Connection] = []
        self._sent: list[Connection] = []

    # In the process that hands over.

    def first(self) -> Iterator[Portion]:
        """See `Part`."""
        self._began = self._keyed.now()
        known = self._keyed.until(self._began)
        while some := list(islice(known, _AT_ONCE)):
            yield Portion(_encode(_keys(some, self._keyed.now())))

    @property
    def unrest(self) -> str:
        """See `Part`."""
        return "a command is being carried out" if any(each.at_work for each in self._connections()) else ""

    def rest(self) -> Portion:
        """See `Part`."""
        service, now, blobs = self._service, self._keyed.now(), Blobs()
        self._sent = [each for each in self._connections() if each.movable]
        watchers = service.context.hub.watchers
        publishers = [
            _Publisher(
                each.state(),
                FORMS.index(each.stream.form),
                [channel.name for channel in each.stream.channels],
                watchers.patterns(each.stream),
                each.stream.waiting(blobs),
            )
            for each in self._sent
        ]
        keys = _keys(self._keyed.since(self._began), now)
        rest = _Rest(keys, publishers, blobs.all, service.commands, service.refused)
        return Portion(_encode(rest), [each.stream.descriptor for each in self._sent])

    def stay(self) -> None:
        """See `Part`."""
        self._sent.clear()

    def gone(self) -> None:
        """See `Part`."""
        for each in self._sent:
            each.leave_to_another_process()
        self._sent.clear()

    def _connections(self) -> Iterator[Connection]:
        return (each for each in self._service.connections if isinstance(each, Connection))

    # In the next process.

    def take(self, portion: TakenPortion) -> None:
        """See `Part`."""
        self._remember(decoded(portion.data, list[_Key]))

    def _remember(self, keys: Sequence[_Key]) -> None:
        for each in keys:
            self._keyed.remember(each.channels, each.key, each.receipts, each.age)

    def take_rest(self, portion: TakenPortion) -> None:
        """See `Part`."""
        rest, service = decoded(portion.data, _Rest), self._service
        self._remember(rest.keys)
        service.commands, service.refused = rest.commands, rest.refused
        if len(rest.publishers) != len(portion.descriptors):
            raise HandOverError(f"{len(rest.publishers)} publishers have come with {len(portion.descriptors)} sockets")
        hub = service.context.hub
        blobs = ReceivedBlobs(rest.blobs, hub.replays, hub.channels)
        for publisher, fd in zip(rest.publishers, portion.descriptors, strict=True):
            connection = self._connection(publisher, _stream(fd, service.answers), blobs)
            self._taken.append((connection, publisher.resumed.asked))

    def _connection(self, publisher: _Publisher, stream: QueuedStream, blobs: ReceivedBlobs) -> Connection:
        if not 0 <= publisher.form < len(FORMS):
            raise HandOverError(f"there is no form {publisher.form} of messages")
        hub = self._service.context.hub
        connection = Connection(stream, self._service)
        stream.form = FORMS[publisher.form]
        for name in publisher.channels:
            hub.rejoin(stream, name)
        hub.watchers.resume(stream, publisher.patterns)
        connection.resume(publisher.resumed)
        if publisher.waiting is not None and not stream.resume(publisher.waiting, blobs):
            self._incomplete.append(connection)
        return connection

    def begin(self) -> None:
        """See `Part`. Then call `report`."""
        for each in self._incomplete:
            pid, uid, gid = each.stream.peer_credentials() or (0, -1, -1)
            log.warning(
                Event("publisher disconnected", code="internal_error", reason=MISSED, pid=pid, uid=uid, gid=gid)
            )
            self._service.context.hub.leave(each.stream)
            self._service.context.hub.watchers.leave(each.stream)
            each.stream.shut()
        for each, _ in self._taken:
            if each not in self._incomplete:
                self._start(each)

    @property
    def taken(self) -> int:
        """How many connections have been taken over, until `report`."""
        return len(self._taken) - len(self._incomplete)

    def report(self, outcome: Mapping[str, object]) -> None:
        """Answer those that have asked for the upgrade. Call it right after `begin`."""
        for each, asked in self._taken:
            if asked is not None:
                each.first_words = encode_response(asked, None, outcome)
        self._taken.clear()
        self._incomplete.clear()


def _keys(known: Iterable[Known], now: float) -> list[_Key]:
    return [_Key(each.channels, each.key, now - each.time, list(each.receipts)) for each in known]


def _stream(fd: int, answers: Backlogs) -> QueuedStream:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
    sock.setblocking(False)
    return QueuedStream(sock, answers)


_encode: Final = msgspec.msgpack.Encoder().encode
