"""The daemon's end of the control socket: commands in, answers out. What the commands do is in `commands`.

Commands that have arrived together are carried out in one go and answered in one write, for a moment; then the
connection takes turns with others that have more to do. Meanwhile nothing else runs, so their publications share a
round of the fan-out. Nothing more is carried out or read on a connection while its answers wait to be read, while the
fan-out is behind, or while too much waits for slow clients: that is how publishers feel back-pressure.

What a connection holds counts (see `Connection.burden`), and so does the sum over all of them, in `Service.answers`.
When that is above its limit, nobody is read, and those that hold most are ended.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from time import thread_time
from types import GeneratorType
from typing import Final

import trio

from realtimed.control.answers import Work
from realtimed.control.commands import carry_out, shown
from realtimed.control.forms import WITHOUT_TIME
from realtimed.control.service import Service
from realtimed.errors import ProtocolError, RefusedError
from realtimed.hub.hub import Joined
from realtimed.hub.position import Receipt
from realtimed.hub.publication import Ending
from realtimed.net.stream import QueuedStream
from realtimed.process.logs import Event
from realtimed.rpc.wire import (
    VALUES_LIMIT,
    Decoder,
    Message,
    Notification,
    Oversized,
    Request,
    Response,
    encode_response,
)

__all__ = ["Connection", "serve_publisher"]

_PARAMS_ROOM: Final = 2**20
"""Bytes a command may have beside its message: names of channels, above all."""

_SLICE_SECONDS: Final = 0.002
"""How much processor time a connection takes in one turn of the event loop; see also `Service.turns`."""

_ANSWERS_BYTES: Final = 64 * 2**10
"""Bytes of answers that are put together before they are written, and the next command waits until they are read."""

_FIRST_COMMAND: Final = 1.0
"""Seconds that a daemon which is about to end waits for the first command of a connection."""

log = logging.getLogger(__name__)


class Connection:
    """One publisher's connection, and its stream's owner."""

    # Invariants: `_work` is the command whose steps are being taken. `_counted` is how many bytes `Service.answers`
    # counts for this connection beside what its stream has waiting, and `_commands` how many it has given.

    def __init__(self, stream: QueuedStream, service: Service) -> None:
        self.stream = stream
        self._service = service
        self._hub = service.context.hub
        self._decoder = Decoder(service.config.max_message + _PARAMS_ROOM, VALUES_LIMIT)
        self._work: Work | None = None
        self._counted = 0
        self._commands = 0
        self._nursery: trio.Nursery
        self._is_new = True
        self._departed = False
        self._credentials = stream.peer()[1] or (0, -1, -1)
        self._forbidden: str | None = None
        self._complained = False
        stream.form = WITHOUT_TIME

    async def run(self) -> None:
        """Carry out commands until the publisher hangs up or breaks the protocol; then shut the stream."""
        self._service.connections.add(self)
        try:
            async with trio.open_nursery() as self._nursery:
                try:
                    self.stream.attach(self._nursery, self)
                    log.debug(Event("publisher connected", **self._peer()))
                    self._check_access()
                    await self._serve()
                    if self._service.stopping and (self.stream.channels or self.stream in self._hub.watchers):
                        await self._service.hear_out(self)
                    with trio.move_on_after(self._service.config.close_timeout):
                        await self.stream.flush()
                finally:
                    # A nursery that is closing takes no new tasks, and others run before it has closed: from here on
                    # neither a publication (`seal`) nor the daemon's stop (`_is_new`) may need one.
                    self.stream.seal()
                    self._is_new = False
                self._nursery.cancel_scope.cancel()
        finally:
            self._hub.leave(self.stream)
            self._hub.watchers.leave(self.stream)
            self._service.connections.remove(self)
            self._service.listening.discard(self)
            self.stream.shut()
            self._count(0)
            self._service.left.unpark_all()
            self.stream.detach()
            self._departed = True
            del self._nursery  # it leads back here

    @property
    def burden(self) -> int:
        """How many bytes of memory may be free again without this connection."""
        return self.stream.burden + self._counted

    @property
    def closing(self) -> bool:
        """Whether somebody has ended the connection."""
        return self._departed or self._nursery.cancel_scope.cancel_called

    def stop(self) -> None:
        """Take no more commands, but for one that has begun to arrive, or the first of all. Returns at once."""
        if self._is_new:
            self._nursery.start_soon(self._stop_later)
        elif not self._decoder.mid_message:
            self.stream.stop_receiving()

    async def _stop_later(self) -> None:
        await trio.sleep(_FIRST_COMMAND)
        self.stream.stop_receiving()

    def end(self, ending: Ending, reason: str) -> None:
        """See `realtimed.net.stream.Owner`."""
        if ending is Ending.SLOW:
            self.end_now("slow", f"it does not read its answers: {reason}")
        elif not self._departed:
            self._nursery.cancel_scope.cancel()

    def end_now(self, code: str, reason: str) -> None:
        """End the connection without a word to its publisher, unless it is ending already. Returns at once."""
        if self.closing:
            return  # it has been said
        log.warning(Event("publisher disconnected", code=code, reason=reason, **self._peer()))
        self._nursery.cancel_scope.cancel()

    async def _serve(self) -> None:
        begun = math.inf  # when the command that is arriving in pieces began to
        service, decoder = self._service, self._decoder
        await service.answers.room()
        while True:
            if service.stopping:
                self.stop()
            try:
                data = await self._receive(begun + service.config.command_timeout)
            except trio.BrokenResourceError:
                return
            if data is None:
                limit = f"{service.config.command_timeout:g} s"
                self._end("timeout", f"a command has begun and not ended; the limit, command-timeout, is {limit}")
                return
            if not data:
                return
            self._is_new = False
            decoder.limit = service.config.max_message + _PARAMS_ROOM  # a reload may have changed it
            decoder.receive(data)
            try:
                any_carried_out = await self._carry_out_all()
            except ProtocolError as error:
                self._end("protocol_error", str(error))
                return
            if not decoder.mid_message:
                begun = math.inf
            elif any_carried_out or begun == math.inf:
                begun = trio.current_time()
            paused_at = trio.current_time()
            await self._pause()
            begun += trio.current_time() - paused_at  # that was not the publisher's time

    async def _receive(self, deadline: float) -> bytes | None:
        """Return what has arrived, or None if nothing has by the deadline."""
        if deadline == math.inf:
            return await self.stream.receive_some(self._service.read_bytes)
        # Not `trio.fail_at`: from Python 3.12 on its exception leads back to itself, and stays.
        with trio.CancelScope(deadline=deadline):
            return await self.stream.receive_some(self._service.read_bytes)
        return None

    def _end(self, code: str, message: str) -> None:
        """Say what ends the connection: a response to no request in particular."""
        self._service.note_refusal(code)
        log.info(Event("publisher disconnected", code=code, reason=message, **self._peer()))
        self.stream.write(encode_response(None, {"code": code, "message": message}, None))

    async def _pause(self) -> None:
        """Wait until the answers have been read and more may be published."""
        self._count(self._decoder.held)
        await self.stream.flush()
        await self._service.answers.room()
        await self._service.room()

    def _count(self, held: int) -> None:
        """Have the service count so many bytes for this connection, beside what waits in its stream."""
        change, self._counted = held - self._counted, held
        self._service.answers.count(change)

    async def _carry_out_all(self) -> bool:
        """Carry out what has come in, and let others have their turn in between; return whether it was anything.

        Raises `ProtocolError` for bytes that are not MessagePack-RPC, after all that came before them.
        """
        before = self._commands
        if not self._service.turns.used_up():
            self._take_slice()
        while True:
            if self._work is not None:
                await self._finish_work(self._work)
            elif not self._decoder.pending:
                return self._commands != before
            await self._pause()
            async with self._service.turns:
                self._take_slice()

    def _take_slice(self) -> None:
        """Carry out commands for a moment; make the first sends as well, if nobody else can publish in this turn."""
        began = thread_time()
        carry_out = partial(self._carry_out, began + _SLICE_SECONDS)
        if len(self._service.connections) == 1:
            self._service.at_once(carry_out)
        else:
            carry_out()
        self._service.turns.spend(thread_time() - began)

    def _carry_out(self, until: float) -> None:
        """Carry out commands until there are none left, time is up, many answers wait, or one goes on in steps."""
        answers: list[bytes] = []
        size = 0
        carry_out_one = self._result if self._forbidden is None else self._forbid
        try:
            while size < _ANSWERS_BYTES and (message := self._decoder.next_message()) is not None:
                self._commands += 1
                self._service.commands += 1
                if answers and self.stream.channels:
                    # What this connection watches may be handed to it while a command is carried out: that comes later.
                    self._write(answers)
                    answers = []
                try:
                    result = carry_out_one(message)
                    if type(result) is Receipt and type(message) is Request:  # as most are: by hand
                        answers.append(encode_response(message.id, None, shown(result)))
                        size += len(answers[-1])
                        if thread_time() > until:
                            break
                        continue
                    pieces = self._answered(message, result, until)
                except RefusedError as error:
                    result, pieces = None, self._refusal(message, error)
                if pieces is None:
                    return
                answers += pieces
                size += sum(map(len, pieces))
                if isinstance(result, Joined):
                    # Before anything newer on that channel.
                    self.stream.write_frames(self._hub.replays.replay(answers, result.missed, self.stream.form))
                    answers = []
                    if result.missed:
                        break  # what is replayed may be long
                if thread_time() > until:
                    break
        finally:
            self._write(answers)

    def _result(self, message: Message) -> object:
        if isinstance(message, (Notification, Request)):
            return carry_out(self._service.context, message.method, message.params, self.stream)
        match message:
            case Oversized(_, limit, "values"):
                raise RefusedError(
                    "message_too_large",
                    f"the command has more than {limit} MessagePack values; that is the limit. Send several commands,"
                    " each with fewer channels",
                )
            case Oversized(_, limit):
                raise RefusedError(
                    "message_too_large",
                    f"the command has more than {limit} bytes; the limit of a message, max-message, is"
                    f" {self._hub.max_message} bytes",
                )
            case Response():
                raise RefusedError("invalid_params", "the daemon has asked nothing: this is a response")

    def _answered(self, message: Message, result: object, until: float) -> list[bytes] | None:
        """Return the pieces of the answer to a command, or None if it goes on in steps for longer than `until`."""
        if not isinstance(result, GeneratorType):
            return [encode_response(message.id, None, shown(result))] if isinstance(message, Request) else []
        assert isinstance(message, (Request, Notification)), "nothing else is a command"
        work = Work(message, result, self._service.answer_limit)
        if (work.publishes or not self._service.walks.locked()) and work.go_on(until):
            return work.pieces
        self._work = work
        return None

    async def _finish_work(self, work: Work) -> None:
        """Take all other steps of a command, with turns for others in between, and write its answer."""
        try:
            if work.publishes:
                with trio.CancelScope(shield=True):  # it is some turns of the event loop, and then all is published
                    await self._take_steps(work)
            else:
                async with self._service.walks:
                    await self._take_steps(work)
        except RefusedError as error:
            self._write(self._refusal(work.message, error))
        else:
            for piece in work.pieces:
                self.stream.write(piece)
        finally:
            self._work = None
            work.close()

    async def _take_steps(self, work: Work) -> None:
        over = False
        while not over:
            self._count(self._decoder.held + work.size)
            async with self._service.turns:
                began = thread_time()
                over = work.go_on(began + _SLICE_SECONDS)
                self._service.turns.spend(thread_time() - began)

    def _refusal(self, message: Message, error: RefusedError) -> list[bytes]:
        """Count a refused command, and return the answer to it, if it gets one."""
        self._service.note_refusal(error.code)
        if isinstance(message, (Request, Oversized)) and message.id is not None:
            return [encode_response(message.id, {"code": error.code, "message": error.message}, None)]
        self._complain(error)
        return []

    def _write(self, answers: Sequence[bytes]) -> None:
        if answers:
            self.stream.write(b"".join(answers))

    def _peer(self) -> dict[str, int]:
        """Return the fields of the log that say who the publisher is."""
        pid, uid, gid = self._credentials
        return {"pid": pid, "uid": uid, "gid": gid}

    def _complain(self, error: RefusedError) -> None:
        """Log that a notification was refused, which its sender is not told: the first time on a connection."""
        if not self._complained:
            self._complained = True
            log.info(Event("notification refused", code=error.code, reason=error.message, **self._peer()))

    def _check_access(self) -> None:
        """Forbid everything to a publisher that is not of the users or groups that are let in."""
        config = self._service.config
        if not config.allow_user and not config.allow_group:
            return
        _, uid, gid = self._credentials
        if uid in config.allow_user or not self.stream.peer_groups().isdisjoint(config.allow_group):
            return
        self._forbidden = (
            "this daemon serves only the users of allow-user and the groups of allow-group;"
            f" you are user {uid} of group {gid}"
        )
        log.warning(Event("publisher not allowed", **self._peer()))

    def _forbid(self, message: Message) -> object:
        raise RefusedError("not_allowed", self._forbidden or "")


async def serve_publisher(stream: QueuedStream, service: Service) -> None:
    """Serve one publisher. This is its exception boundary: a fault inside is a bug, and ends this connection only."""
    try:
        await Connection(stream, service).run()
    except Exception:
        log.exception(Event("internal error", client="publisher"))
