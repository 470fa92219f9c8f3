"""What passes from one process's sessions to the next one's: every client that is connected and is not ending.

At first, while everybody is served, each client goes over with its socket and with what hardly changes: who it is, and
its channels. At the end, those that are new, what has changed of the others, and what is under way: messages that have
not come in full, what waits for a client, requests of which the end is missing.

Connections that are ending stay: they have the deadline of a Close, and the process that has sent it waits that long.

A socket that two processes have open is not closed for the peer when one of them closes it. So while a hand-over is
under way, a connection that ends is shut down first, if the next process has its socket already.
"""

from __future__ import annotations

import socket
from array import array
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec
import trio

from realtimed.hub.channel import Channel
from realtimed.hub.publication import Ending
from realtimed.net.admission import Buckets
from realtimed.net.fanout import MISSED
from realtimed.net.waiting import Blob, Blobs, ReceivedBlobs, Waiting
from realtimed.process.portions import HandOverError, Part, Portion, TakenPortion, decoded
from realtimed.websocket.arrival import Arrival
from realtimed.websocket.protocols import choose
from realtimed.websocket.session import Session
from realtimed.websocket.sessions import Sessions
from realtimed.websocket.stream import ClientStream, InboundLimits

__all__ = ["SessionsPart"]

_AT_ONCE: Final = 100
"""Clients in a portion: a fraction of a millisecond, and fewer descriptors than the kernel takes at a time."""


class _Client(msgspec.Struct, array_like=True):
    """A client. Ages are in seconds; `expires_in` may be infinite."""

    id: str
    protocol: str
    address: str
    tcp: bool
    rank: int
    connected_since: float
    age: float
    expires_in: float
    limits: tuple[int, float, int]
    channels: list[str]


class _Busy(msgspec.Struct, array_like=True):
    """A client, by its place among those that have been sent, of which something is under way."""

    place: int
    unfinished: bytes = b""
    waiting: Waiting | None = None
    inbox: list[tuple[bytes, bool]] = []
    """Messages that wait, each with whether it is text."""


class _Arriving(msgspec.Struct, array_like=True):
    """A connection whose request has not come in full."""

    id: str
    tcp: bool
    age: float
    head: bytes


class _Rest(msgspec.Struct):
    """What has changed since the beginning. Places are those of clients in the order in which they were sent."""

    gone: list[int]
    clients: list[_Client]
    channels: list[tuple[int, list[str]]]
    heard: bytes
    full: bytes
    """For each client, as doubles: the seconds since it was heard, and until it may send a whole burst."""
    busy: list[_Busy]
    blobs: list[Blob]
    arriving: list[_Arriving]
    run_id: str
    issued: int
    connections: int
    refused: dict[int, int]
    closed: dict[int, int]
    ended: dict[str, int]
    buckets: Buckets
    share: int = 0


class _Sent(NamedTuple):
    """A client as it has been sent."""

    session: Session
    stream: ClientStream
    channels: set[Channel]


class SessionsPart(Part):
    """Hands over sessions, or takes them over. The hub's part comes before this one."""

    # Invariants: `_sent` has the clients in the order in which they were sent, and `_taken` those that have come, in
    # this order; a place is an index into either. `_resumed` has what is to be done for clients at `begin`.

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._sent: list[_Sent] = []
        self._taken: list[Session | None] = []
        self._limits: dict[tuple[int, float, int], InboundLimits] = {}
        self._unfinished: list[tuple[Session, bytes]] = []
        self._waiting: list[Session] = []
        self._incomplete: list[Session] = []
        self._arrivals: list[tuple[Arrival, bytes]] = []

    # In the process that hands over.

    def first(self) -> Iterator[Portion]:
        """See `Part`."""
        sessions = self._sessions
        self._sent.clear()
        sessions.announced = set()
        everyone = list(sessions.members.values())
        for at in range(0, len(everyone), _AT_ONCE):
            clients, files = self._send(each for each in everyone[at : at + _AT_ONCE] if not each.closing)
            yield Portion(_encode(clients), files)

    def _send(self, members: Iterator[Session]) -> tuple[list[_Client], list[int]]:
        """Return clients with their descriptors, and record that they have been sent."""
        announced = self._sessions.announced
        assert announced is not None, "a hand-over is under way"
        now = trio.current_time()
        clients, files = [], []
        for each in members:
            stream = each.stream
            clients.append(
                _Client(
                    each.id,
                    each.protocol,
                    each.address,
                    stream.tcp,
                    each.rank,
                    each.connected_since,
                    now - each.began_at,
                    each.expires_at - now,
                    stream.limits,
                    [channel.name for channel in stream.channels],
                )
            )
            files.append(stream.descriptor)
            self._sent.append(_Sent(each, stream, stream.channels.copy()))
            announced.add(each)
        return clients, files

    @property
    def unrest(self) -> str:
        """See `Part`."""
        return "" if self._sessions.engines.at_rest else "messages of clients are being read"

    def rest(self) -> Portion:
        """See `Part`."""
        sessions = self._sessions
        announced = sessions.announced
        assert announced is not None, "a hand-over is under way"
        known = len(self._sent)
        new = [each for each in sessions.members.values() if each not in announced and not each.closing]
        clients, files = self._send(iter(new))
        arriving = [(arrival, age) for arrival, age in sessions.handshakes.ages() if not arrival.answered]
        files += [arrival.stream.descriptor for arrival, _ in arriving]
        now, blobs = trio.current_time(), Blobs()
        gone, channels, busy = [], [], []
        heard, full = array("d"), array("d")
        for place, (session, stream, had) in enumerate(self._sent):
            heard.append(now - stream.heard_at)
            full.append(stream.full_at - now)
            if session.closing:
                gone.append(place)
                continue
            if place < known and stream.channels != had:
                channels.append((place, [channel.name for channel in stream.channels]))
            unfinished, waiting, inbox = stream.unfinished, stream.waiting(blobs), session.inbox
            if unfinished or waiting is not None or inbox:
                messages = [(each.encode(), True) if isinstance(each, str) else (each, False) for each in inbox or ()]
                busy.append(_Busy(place, unfinished, waiting, messages))
        rest = _Rest(
            gone, clients, channels, heard.tobytes(), full.tobytes(), busy, blobs.all,
            [_Arriving(each.id, each.stream.tcp, age, each.collected) for each, age in arriving],
            sessions.run_id, sessions.issued, sessions.connections, sessions.refused, sessions.closed,
            {ending.value: count for ending, count in sessions.ended.items()},
            sessions.admission.buckets(), sessions.share,
        )  # fmt: skip
        return Portion(_encode(rest), files)

    def stay(self) -> None:
        """See `Part`."""
        self._sessions.announced = None
        self._sent.clear()

    def gone(self) -> None:
        """See `Part`."""
        sessions = self._sessions
        sessions.announced = None
        arrivals = [each for each in sessions.handshakes if not each.answered]
        for session, *_ in self._sent:
            if not session.closing:
                session.leave_to_another_process()
        for arrival in arrivals:
            arrival.leave_to_another_process()
        self._sent.clear()

    # In the next process.

    def take(self, portion: TakenPortion) -> None:
        """See `Part`."""
        clients = decoded(portion.data, list[_Client])
        self._add(clients, portion.descriptors)

    def _add(self, clients: Sequence[_Client], files: Sequence[int]) -> None:
        if len(clients) != len(files):
            raise HandOverError(f"{len(clients)} clients have come with {len(files)} sockets")
        now, hub = trio.current_time(), self._sessions.hub
        for client, fd in zip(clients, files, strict=True):
            session = self._session(client, self._stream(fd, client.tcp, client.limits), now)
            for name in client.channels:
                hub.rejoin(session.stream, name)
            self._taken.append(session)

    def _stream(self, fd: int, tcp: bool, limits: tuple[int, float, int] | None = None) -> ClientStream:
        # To ask the kernel for all of this would cost some calls for each.
        sock = socket.socket(fileno=fd) if tcp else socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
        sock.setblocking(False)
        stream = self._sessions.client_stream(sock)
        if limits is not None:
            stream.set_limits(self._limits.setdefault(limits, InboundLimits(*limits)))
        self._sessions.open += 1
        return stream

    def _session(self, client: _Client, stream: ClientStream, now: float) -> Session:
        """Return a client's session, which is a member from now on, and is not read yet."""
        sessions = self._sessions
        place = sessions.admission.readmit(client.address)
        protocol = choose([client.protocol])
        session = Session(client.id, stream, sessions, protocol, client.address, place, now - client.age)
        stream.attach(session)
        session.resume(client.rank, client.connected_since, now + client.expires_in)
        sessions.watcher.add(stream.descriptor, session)
        return session

    def take_rest(self, portion: TakenPortion) -> None:
        """See `Part`."""
        rest = decoded(portion.data, _Rest)
        sessions, hub = self._sessions, self._sessions.hub
        known = len(self._taken)
        split = len(rest.clients)
        for place, names in rest.channels:
            self._change_channels(self._at(place), names)
        self._add(rest.clients, portion.descriptors[:split])
        self._set_times(rest.heard, rest.full)
        for place in rest.gone:
            self._drop(place, known)
        blobs = ReceivedBlobs(rest.blobs, hub.replays, hub.channels)
        for busy in rest.busy:
            self._resume(self._at(busy.place), busy, blobs)
        if len(rest.arriving) != len(portion.descriptors) - split:
            raise HandOverError("requests have come without their sockets")
        for each, fd in zip(rest.arriving, portion.descriptors[split:], strict=True):
            arrival = Arrival(self._stream(fd, each.tcp), sessions, each.id)
            arrival.resume(each.age)
            self._arrivals.append((arrival, each.head))
        sessions.run_id, sessions.issued, sessions.connections = rest.run_id, rest.issued, rest.connections
        sessions.share = rest.share - 1  # some of it may not have been pinged
        sessions.refused, sessions.closed = rest.refused, rest.closed
        sessions.ended |= {ending: rest.ended.get(ending.value, 0) for ending in Ending}
        sessions.admission.go_on_from(rest.buckets)

    def _at(self, place: int) -> Session:
        session = self._taken[place] if 0 <= place < len(self._taken) else None
        if session is None:
            raise HandOverError(f"there is no client at place {place}")
        return session

    def _change_channels(self, session: Session, names: Sequence[str]) -> None:
        hub, stream = self._sessions.hub, session.stream
        for channel in [each for each in stream.channels if each.name not in names]:
            hub.unsubscribe(stream, channel.name)
        for name in names:
            hub.rejoin(stream, name)

    def _set_times(self, heard: bytes, full: bytes) -> None:
        heard_ages, full_in = array("d", heard), array("d", full)
        if not len(heard_ages) == len(full_in) == len(self._taken):
            raise HandOverError("not every client has the time when it was heard")
        now = trio.current_time()
        for session, age, seconds in zip(self._taken, heard_ages, full_in, strict=True):
            if session is not None:
                session.stream.go_on_from(now - age, now + seconds)

    def _drop(self, place: int, known: int) -> None:
        """Forget a client that has begun to end in the process before this one."""
        session = self._at(place)
        if place >= known:
            raise HandOverError(f"the client at place {place} is new, and has gone")
        self._taken[place] = None
        session.leave_to_another_process()

    def _resume(self, session: Session, busy: _Busy, blobs: ReceivedBlobs) -> None:
        """Take over what is under way for a client."""
        if busy.unfinished:
            self._unfinished.append((session, busy.unfinished))
        if busy.inbox:
            session.resume_inbox(data.decode() if text else data for data, text in busy.inbox)
        if busy.waiting is not None and not session.stream.resume(busy.waiting, blobs):
            self._incomplete.append(session)
        if busy.inbox or busy.waiting is not None:
            self._waiting.append(session)

    def begin(self) -> None:
        """See `Part`."""
        sessions = self._sessions
        for session in self._incomplete:
            session.end(Ending.FAULT, MISSED)
        for session, unfinished in self._unfinished:
            sessions.engines.feed(session, session.stream.resume_message(unfinished))
        for session in self._waiting:
            session.stream.resume_draining()
            session.replay_sent()
        for arrival, head in self._arrivals:
            arrival.resume_head(head)
        for each in (self._taken, self._incomplete, self._unfinished, self._waiting, self._arrivals):
            each.clear()


_encode: Final = msgspec.msgpack.Encoder().encode
