"""The daemon's end of the control socket: commands in, answers out. `commands` has what the commands do.

Commands that have arrived together are carried out one after the other and answered in one write, for a moment; then
the connection takes turns with others that have more to do. Meanwhile nothing else runs, so their publications share a
round of the fan-out. A connection pauses, so that nothing more is read or carried out on it, while its answers wait to
be read, while the fan-out is behind, or while too much waits for slow clients. Publishers feel that as back-pressure.

The memory that a connection holds is counted (see `Connection.burden`), and so is the sum of all in `Service.answers`.
Above its limit nothing is read from any connection, and `shedding` ends those that hold most.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from time import thread_time
from types import GeneratorType
from typing import Final

import trio

from realtimed.control.access import why_forbidden
from realtimed.control.answers import begin_work, dispatch, encode_refusal, forbid
from realtimed.control.commands import UNDER_WAY, shown
from realtimed.control.forms import WITHOUT_TIME
from realtimed.control.service import SLICE_SECONDS, Service
from realtimed.control.states import Resumed, State, Unfinished
from realtimed.control.steps import Steps, answer_limit
from realtimed.errors import ProtocolError, RefusedError
from realtimed.hub.publication import Ending
from realtimed.hub.results import Joined
from realtimed.net.stream import QueuedStream
from realtimed.process.logs import Event
from realtimed.rpc.wire import VALUES_LIMIT, Decoder, Message, Notification, Request, encode_response

__all__ = ["Connection"]

_PARAMS_BYTES: Final = 2**20
"""Bytes that a command may have beside its message: names of channels, above all."""

_ANSWERS_BYTES: Final = 64 * 2**10
"""Bytes of answers that are collected before they are written. The next command waits until they have been read."""

_FIRST_COMMAND: Final = 1.0
"""Seconds that a daemon which is about to end waits for the first command of a connection."""

log = logging.getLogger(__name__)


class Connection:
    """One publisher's connection, and its stream's owner."""

    # Invariants: `_unfinished` is the command whose steps are being taken. `_counted` is how many bytes
    # `Service.answers` counts for this connection beside what its stream has waiting. `_commands` is how many commands
    # have come, and `_refusal_logged` whether a refused notification has been logged. `_dispatch` carries out the
    # command in a message; for a publisher that is not let in it is `forbid`. `_began` is when the command that is
    # arriving in pieces began to, infinite if none is.

    def __init__(self, stream: QueuedStream, service: Service) -> None:
        self.stream = stream
        self._service = service
        self._hub = service.context.hub
        self._decoder = Decoder(service.config.max_message + _PARAMS_BYTES, VALUES_LIMIT)
        self._state = State.NEW
        self._nursery: trio.Nursery
        self._dispatch: Callable[[Message], object] = partial(dispatch, service.context, stream)
        self._unfinished: Unfinished | None = None
        self._counted = 0
        self._commands = 0
        self._refusal_logged = False
        self._began = math.inf
        self.first_words = b""
        """What is written as soon as the connection runs."""
        self._upgrade: Request | Notification | None = None
        """The request for an upgrade whose outcome is awaited."""
        self._upgrade_over = trio.lowlevel.ParkingLot()
        pid, uid, gid = stream.peer_credentials() or (0, -1, -1)
        self._peer = {"pid": pid, "uid": uid, "gid": gid}
        """The fields of the log that say who the publisher is."""
        stream.form = WITHOUT_TIME

    async def run(self) -> None:
        """Carry out commands until the publisher hangs up or breaks the protocol; then shut the stream."""
        self._service.connections.add(self)
        try:
            async with trio.open_nursery() as self._nursery:
                try:
                    await self._converse()
                finally:
                    # A nursery that is closing takes no new tasks, and others run before it has closed. From here on
                    # neither a publication (`seal`) nor the daemon's stop (`_state`) may need one.
                    self.stream.seal()
                    self._state = State.ENDING
                self._nursery.cancel_scope.cancel()
        finally:
            self._close()

    async def _converse(self) -> None:
        """Serve the publisher, and wait until it has read the answers, or `close-timeout` has passed."""
        self.stream.attach(self._nursery, self, self._service.gate)
        self.stream.resume_draining()
        self._write([self.first_words] if self.first_words else [])
        log.debug(Event("publisher connected", **self._peer))
        self._check_access()
        await self._serve()
        self._state = State.LEAVING
        if self._service.stopping and (self.stream.channels or self.stream in self._hub.watchers):
            await self._service.hear_out(self)
        with trio.move_on_after(self._service.config.close_timeout):
            await self.stream.flush()

    def _close(self) -> None:
        self._hub.leave(self.stream)
        self._hub.watchers.leave(self.stream)
        self._service.connections.remove(self)
        self._service.lingering.discard(self)
        self.stream.shut()
        self._count(0)
        self._service.finished.unpark_all()
        self.stream.detach()
        self._state = State.CLOSED
        del self._nursery  # it leads back here

    @property
    def burden(self) -> int:
        """How many bytes of memory may be free again without this connection."""
        return self.stream.burden + self._counted

    @property
    def closing(self) -> bool:
        """Whether the daemon has ended the connection, or it has closed."""
        return self._state is State.CLOSED or self._nursery.cancel_scope.cancel_called

    def stop(self) -> None:
        """Take no more commands, except one that has begun to arrive, or the first of all. Returns at once."""
        if self._state is State.NEW:
            self._nursery.start_soon(self._stop_later)
        elif not self._decoder.mid_message:
            self.stream.stop_receiving()

    async def _stop_later(self) -> None:
        await trio.sleep(_FIRST_COMMAND)
        self.stream.stop_receiving()

    def end(self, ending: Ending, reason: str) -> None:
        """See `realtimed.net.outbound.Owner`."""
        if ending is Ending.SLOW:
            self.end_now("slow", f"it does not read its answers: {reason}")
        elif self._state is not State.CLOSED:
            self._nursery.cancel_scope.cancel()

    def end_now(self, code: str, reason: str) -> None:
        """End the connection without a word to its publisher, unless it is ending already. Returns at once."""
        if self.closing:
            return  # the log has the reason already
        log.warning(Event("publisher disconnected", code=code, reason=reason, **self._peer))
        self._nursery.cancel_scope.cancel()

    # Passing to another process, and coming from one.

    @property
    def at_work(self) -> bool:
        """Whether a command is half carried out."""
        return self._unfinished is not None

    @property
    def movable(self) -> bool:
        """Whether the connection is not ending."""
        return self._state in (State.NEW, State.SERVING) and not self.closing

    def state(self) -> Resumed:
        """Return what another process has to know."""
        return Resumed(
            self._decoder.state(),
            is_new=self._state is State.NEW,
            age=trio.current_time() - self._began if self._began != math.inf else None,
            commands=self._commands,
            refusal_logged=self._refusal_logged,
            asked=self._upgrade.id if isinstance(self._upgrade, Request) else None,
        )

    def resume(self, state: Resumed) -> None:
        """Go on as in another process, from `run` on."""
        self._decoder.resume(state.decoder)
        self._state = State.NEW if state.is_new else State.SERVING
        self._began = trio.current_time() - state.age if state.age is not None else math.inf
        self._commands, self._refusal_logged = state.commands, state.refusal_logged

    def refuse_upgrade(self, reason: str) -> None:
        """Answer the request for an upgrade, if there was one: it has failed."""
        message, self._upgrade = self._upgrade, None
        if message is not None:
            self._write([self._refuse(message, RefusedError("upgrade_failed", reason))])
            self._upgrade_over.unpark_all()

    def leave_to_another_process(self) -> None:
        """Forget a connection that goes on elsewhere: it has not ended."""
        self._nursery.cancel_scope.cancel()
        self.stream.shut()  # at once: a task that drains it may be about to send

    # Reading.

    async def _serve(self) -> None:
        """Read commands and carry them out until the publisher hangs up, or an error ends the connection."""
        service, decoder = self._service, self._decoder
        await service.answers.room()
        if decoder.held and not await self._carry_out():  # what another process has received
            return
        while True:
            if service.stopping:
                self.stop()
            data = await self._receive(self._began + service.config.command_timeout)
            if data is None:
                limit = f"{service.config.command_timeout:g} s"
                self._write_last_words(
                    "timeout", f"a command has begun and not ended; the limit, command-timeout, is {limit}"
                )
                return
            if not data:
                return
            self._state = State.SERVING
            decoder.limit = service.config.max_message + _PARAMS_BYTES  # a reload may have changed it
            decoder.receive(data)
            if not await self._carry_out():
                return

    async def _carry_out(self) -> bool:
        """Carry out what has been received; return False if it is not MessagePack-RPC, which the publisher is told."""
        commands = self._commands
        try:
            await self._work_off()
        except ProtocolError as error:
            self._write_last_words("protocol_error", str(error))
            return False
        if not self._decoder.mid_message:
            self._began = math.inf
        elif self._commands != commands or self._began == math.inf:
            self._began = trio.current_time()
        paused_at = trio.current_time()
        await self._pause()
        self._began += trio.current_time() - paused_at  # that was not the publisher's time
        return True

    async def _receive(self, deadline: float) -> bytes | None:
        """Return what has arrived, nothing if the publisher has hung up, or None if the deadline has passed."""
        try:
            if deadline == math.inf:
                return await self.stream.receive_some(self._service.read_size)
            # Not `trio.fail_at`: from Python 3.12 on its exception refers to itself, and stays in memory.
            with trio.CancelScope(deadline=deadline):
                return await self.stream.receive_some(self._service.read_size)
        except trio.BrokenResourceError:
            return b""
        return None

    def _write_last_words(self, code: str, message: str) -> None:
        """Tell the publisher, in a response to no request in particular, why the connection ends."""
        self._service.note_refusal(code)
        log.info(Event("publisher disconnected", code=code, reason=message, **self._peer))
        self.stream.write(encode_response(None, {"code": code, "message": message}, None))

    async def _pause(self) -> None:
        """Wait until the answers have been read and more may be published."""
        self._count_held()
        await self.stream.flush()
        await self._service.answers.room()
        await self._service.until_publishable()

    def _count_held(self) -> None:
        """Count the bytes of commands that have not been carried out, and of the answer in the making."""
        self._count(self._decoder.held + (self._unfinished.work.size if self._unfinished is not None else 0))

    def _count(self, held: int) -> None:
        """Count `held` bytes for this connection, beside what waits in its stream."""
        change, self._counted = held - self._counted, held
        self._service.answers.count(change)

    # Carrying out.

    async def _work_off(self) -> None:
        """Carry out all commands that have come in, with turns for others in between.

        Raises `ProtocolError` for bytes that are not MessagePack-RPC, after all commands before them.
        """
        gate = self._service.gate
        if not gate.closed and not self._service.turns.used_up():
            self._run_slice()
        while True:
            if self._unfinished is not None:
                await self._finish_steps(self._unfinished)
            elif self._upgrade is not None:
                await self._upgrade_over.park()
            elif not self._decoder.pending:
                return
            await self._pause()
            await gate.passed()
            async with self._service.turns:
                if not gate.closed:
                    self._run_slice()

    def _run_slice(self) -> None:
        """Carry out commands for one turn's share; make the first sends as well if this is the only publisher."""
        began = thread_time()
        run = partial(self._run_commands, began + SLICE_SECONDS)
        if len(self._service.connections) == 1:
            self._service.publish_now(run)
        else:
            run()
        self._service.turns.spend(thread_time() - began)

    def _run_commands(self, until: float) -> None:
        """Carry out commands until there are none left, time is up, many answers wait, or one goes on in steps."""
        answers: list[bytes] = []
        size = 0
        try:
            while size < _ANSWERS_BYTES and (message := self._decoder.next_message()) is not None:
                self._commands += 1
                self._service.commands += 1
                if answers and self.stream.channels:
                    # The command may publish to this connection: its messages come after these answers.
                    self._write(answers)
                    answers = []
                try:
                    result = self._dispatch(message)
                    if result is UNDER_WAY and isinstance(message, (Request, Notification)):
                        self._upgrade = message
                        return
                    if type(result) is GeneratorType:
                        answer = self._begin_steps(message, result, until)
                    elif type(message) is Request:
                        answer = encode_response(message.id, None, shown(result))
                    else:
                        answer = b""
                except RefusedError as error:
                    result, answer = None, self._refuse(message, error)
                if self._unfinished is not None:
                    return
                if answer:
                    answers.append(answer)
                    size += len(answer)
                if type(result) is Joined:
                    # What was missed comes right behind the answer, and before anything newer on that channel.
                    self.stream.write_frames(self._hub.replays.replay(answers, result.missed, self.stream.form))
                    answers = []
                    if result.missed:
                        return  # the replay may be long
                if thread_time() > until:
                    return
        finally:
            self._write(answers)  # also before an error that ends the connection

    def _begin_steps(self, message: Message, steps: Steps, until: float) -> bytes:
        """Take the first steps of a command; return its answer, unless the command is `_unfinished` then."""
        assert isinstance(message, (Request, Notification)), "nothing else is a command"
        work, answer = begin_work(message, steps, answer_limit(self._service.config.max_answers_total))
        if not self._service.begin(work, until):
            self._unfinished = Unfinished(message, work, answer)
            return b""
        return b"".join(answer.pieces) if answer is not None else b""

    async def _finish_steps(self, unfinished: Unfinished) -> None:
        """Take all other steps of a command, with turns for others in between, and write its answer."""
        message, work, answer = unfinished
        try:
            await self._service.finish(work, self._count_held)
        except RefusedError as error:
            if refusal := self._refuse(message, error):
                self.stream.write(refusal)
        else:
            for piece in answer.pieces if answer is not None else []:
                self.stream.write(piece)
        finally:
            self._unfinished = None
            work.close()

    def _refuse(self, message: Message, error: RefusedError) -> bytes:
        """Count a refused command and return its answer. The log gets the first on a connection that has no answer."""
        self._service.note_refusal(error.code)
        answer = encode_refusal(message, error)
        if not answer and not self._refusal_logged:
            self._refusal_logged = True
            log.info(Event("notification refused", code=error.code, reason=error.message, **self._peer))
        return answer

    def _write(self, answers: Sequence[bytes]) -> None:
        if answers:
            self.stream.write(b"".join(answers))

    def _check_access(self) -> None:
        """Forbid every command to a publisher that is not let in. It keeps its connection."""
        reason = why_forbidden(self._service.config, self.stream)
        if reason is not None:
            self._dispatch = partial(forbid, reason)
            log.warning(Event("publisher not allowed", **self._peer))
