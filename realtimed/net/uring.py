"""Sends to many sockets in one system call, through io_uring (Linux 5.19 and later).

The fan-out's loop in Python costs a fifth of its time between two calls of `socket.send`. Here the kernel runs the
loop: the bytes are copied once to memory that the kernel reads, and a batch of sends is three columns of numbers (which
socket, where the bytes are, how many), each written with a slice assignment, unless it is the same as last time.

Every send is non-blocking and has ended when `io_uring_enter` returns: nothing is ever in flight between two calls, so
no buffer has to outlive one, and a closed descriptor cannot be mistaken for its successor. Where the kernel has no
io_uring, or an administrator has forbidden it (``kernel.io_uring_disabled``, a container's system call filter), the
loop in Python does the same work.

Source: io_uring(7), io_uring_setup(2), io_uring_enter(2), and linux/io_uring.h for the layout of the structures.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import socket
import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from realtimed.hub.rounds import Batch, send_each
from realtimed.process.logs import Event

__all__ = ["SendRing", "open_ring"]

log = logging.getLogger(__name__)

# These numbers are the same on every architecture that got its system calls after the table was unified.
_SETUP: Final = 425
_ENTER: Final = 426

_SUBMIT_ALL: Final = 1 << 7  # Linux 5.18: a send that fails does not hold up those behind it
_COOPERATE: Final = 1 << 8  # Linux 5.19: no interrupts for completions, as we look for them ourselves
_GET_EVENTS: Final = 1 << 0
_SEND: Final = 26
_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

_OFFSET_SHARED: Final = 0
_OFFSET_SUBMISSIONS: Final = 0x10000000
_ENTRY: Final = struct.Struct("=BBHiQQIIQ24x")
"""opcode, flags, ioprio, fd, off, addr, len, msg_flags, user_data."""

_COMPLETION: Final = struct.Struct("=QiI")
"""user_data, res, flags."""

_PARAMETERS: Final = 120
_SIZES: Final = struct.Struct("=7I")
"""sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd."""
_OFFSETS: Final = struct.Struct("=8IQ")
"""Of the submissions: head, tail, mask, entries, flags, dropped, array. Of the completions: head, tail, mask, entries,
overflow, cqes."""

_WRAP: Final = 1 << 32

_ENTRIES: Final = 1024
"""Sends in one system call."""

_NUMBERS: Final = memoryview(array("I", range(_ENTRIES)))
_IN_PLACE: Final = array("Q", range(_ENTRIES))
_ALL_COMPLETED: Final = array("i", b"".join(_COMPLETION.pack(number, 0, 0) for number in range(_ENTRIES)))
"""The completions of so many submissions, but for their results, which are in every fourth place from the third on."""

_STAGE: Final = 2**20
"""Bytes that can be sent in one go: as a rule, more than a slice of a round has. What has more goes out by halves."""

_WORTHWHILE: Final = 16
"""Sends from which on the ring is faster than the loop. With everything in the processor's caches it is not until
twice as many; but between two rounds of many channels nothing stays there, and the ring looks at less (measured)."""

_FEW: Final = 8
"""Receivers up to which a column grows faster by a list than by an array that is multiplied (measured)."""


class _Column:
    """One field of all submissions. What is in it already is not written again: often it is the same as last time."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._values = array(memory.format)

    def write(self, values: array[int]) -> bool:
        """Make this the field of the first submissions; return whether it was not before. Nobody may change it then."""
        if values == self._values:
            return False
        self._memory[: len(values)] = memoryview(values)
        self._values = values
        return True


class _Queues:
    """The memory shared with the kernel, and the columns of it that matter here."""

    # Invariants: all of it is mapped as long as this object lives. Both queues are empty but within `exchange`. Send
    # number i of a call is made with submission i, which carries i as its user data, for good; the queue is made of the
    # numbers of submissions. `_expected` is the completions that submissions with the sizes that are in `_sizes` have
    # if everything goes well.

    def __init__(self) -> None:
        # Only here: importing it can fail where memory that is written may not be executed.
        import ctypes  # noqa: PLC0415

        self._ctypes = ctypes
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        self._syscall.argtypes = [ctypes.c_long] * 7
        parameters = ctypes.create_string_buffer(_PARAMETERS)
        struct.pack_into("=III", parameters, 0, 0, 0, _SUBMIT_ALL | _COOPERATE)
        self._expected = b""
        self.fd = self.call(_SETUP, _ENTRIES, ctypes.addressof(parameters))
        try:
            self._map(bytes(parameters))
        except (OSError, ValueError):
            os.close(self.fd)
            raise

    def exchange(self, descriptors: array[int], addresses: array[int], sizes: array[int]) -> Sequence[int] | None:
        """Send to each of at most `_ENTRIES` descriptors what lies at an address on the stage, so many bytes of it.

        Returns None if all of them have taken all of it, and otherwise the result of each: bytes taken, or a negative
        error number, ``-EBADF`` for what the kernel would not even try. The arrays may not be changed any more.
        """
        count = len(descriptors)
        self._descriptors.write(descriptors)
        self._addresses.write(addresses)
        if self._sizes.write(sizes):
            expected = _ALL_COMPLETED[: 4 * count]
            expected[2::4] = sizes
            self._expected = expected.tobytes()
        tail = self._tail[0]
        room = _ENTRIES - tail % _ENTRIES
        self._queue[tail % _ENTRIES : tail % _ENTRIES + count] = _NUMBERS[: min(count, room)]
        self._queue[: max(count - room, 0)] = _NUMBERS[room : max(count, room)]
        self._tail[0] = (tail + count) % _WRAP
        try:
            taken = self.call(_ENTER, self.fd, count)
        except OSError:
            taken = 0
        if taken < count:
            self._tail[0] = self._head[0]
        start = self._completed_head[0]
        while (self._completed_tail[0] - start) % _WRAP < taken:  # never seen: a send that does not wait ends at once
            with suppress(InterruptedError):
                self.call(_ENTER, self.fd, 0, taken, _GET_EVENTS)
        completed = self._completed(start % self._completions, taken)
        self._completed_head[0] = (start + taken) % _WRAP
        if completed == self._expected:
            return None
        if array("Q", completed)[::2] == _IN_PLACE[:count]:
            return array("i", completed)[2::4]
        results = array("i", (-errno.EBADF,)) * count
        for number, result, _ in _COMPLETION.iter_unpack(completed):
            results[number] = result
        return results

    def _completed(self, at: int, count: int) -> bytes:
        """Return `count` completions from `at` on, around the end of their queue."""
        cut = max(at + count - self._completions, 0)
        raw = self._events[_COMPLETION.size * at : _COMPLETION.size * (at + count - cut)].tobytes()
        return raw + self._events[: _COMPLETION.size * cut].tobytes()

    def _map(self, parameters: bytes) -> None:
        entries, self._completions, *_ = _SIZES.unpack_from(parameters, 0)
        head, tail, _, _, _, _, indices, *_ = _OFFSETS.unpack_from(parameters, 40)
        completed_head, completed_tail, _, _, _, events, *_ = _OFFSETS.unpack_from(parameters, 80)
        size = max(indices + 4 * entries, events + _COMPLETION.size * self._completions)
        shared = memoryview(mmap.mmap(self.fd, size, offset=_OFFSET_SHARED))
        submissions = memoryview(mmap.mmap(self.fd, _ENTRY.size * entries, offset=_OFFSET_SUBMISSIONS))
        self.stage = mmap.mmap(-1, _STAGE)
        self.stage_address = self._ctypes.addressof(self._ctypes.c_char.from_buffer(self.stage))
        for index in range(entries):
            _ENTRY.pack_into(submissions, _ENTRY.size * index, _SEND, 0, 0, -1, 0, 0, 0, _FLAGS, index)
        self._head = shared[head : head + 4].cast("I")
        self._tail = shared[tail : tail + 4].cast("I")
        self._completed_head = shared[completed_head : completed_head + 4].cast("I")
        self._completed_tail = shared[completed_tail : completed_tail + 4].cast("I")
        self._queue = shared[indices : indices + 4 * entries].cast("I")
        self._descriptors = _Column(submissions.cast("i")[1::16])
        self._addresses = _Column(submissions.cast("Q")[2::8])
        self._sizes = _Column(submissions.cast("i")[6::16])
        self._events = shared[events : events + _COMPLETION.size * self._completions]

    def call(self, *numbers: int) -> int:
        """Make a system call; the first number says which. Raises `OSError`."""
        result = int(self._syscall(*numbers, *[0] * (7 - len(numbers))))
        if result < 0:
            number = self._ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result


class SendRing:
    """Does what `realtimed.hub.rounds.send_each` does, up to a thousand sends in one system call.

    Raises `OSError` if the kernel does not offer it, or does it otherwise than expected; `MemoryError` if the system
    does not let Python call functions of C.
    """

    def __init__(self) -> None:
        self.queues = _Queues()
        try:
            self._try_out()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Give back the descriptor. The ring is of no further use."""
        os.close(self.queues.fd)

    def __call__(self, batch: Batch) -> None:
        """Send to each subscriber its data, and have what the kernel does not take dealt with as `send_each` does."""
        if len(batch) < _WORTHWHILE and sum([stop - start for _, _, start, stop in batch]) < _WORTHWHILE:
            send_each(batch)
        elif sum([len(part[0]) for part in batch]) <= _STAGE:
            self._send(batch)
        elif len(batch) > 1:
            middle = len(batch) // 2
            self(batch[:middle])
            self(batch[middle:])
        else:
            send_each(batch)

    def _send(self, batch: Batch) -> None:
        """Send what fits on the stage, in as few system calls as there can be."""
        descriptors, addresses, sizes = array("i"), array("Q"), array("i")
        address = self.queues.stage_address
        for data, roster, start, stop in batch:
            size, receivers = len(data), stop - start
            descriptors += roster.descriptors(start, stop)
            if receivers > _FEW:
                addresses += array("Q", (address,)) * receivers
                sizes += array("i", (size,)) * receivers
            else:
                addresses.fromlist([address] * receivers)
                sizes.fromlist([size] * receivers)
            address += size
        self.queues.stage[: address - self.queues.stage_address] = b"".join([part[0] for part in batch])
        for at in range(0, len(descriptors), _ENTRIES):
            end = at + _ENTRIES
            results = self.queues.exchange(descriptors[at:end], addresses[at:end], sizes[at:end])
            if results is not None:
                _deal_with_all(batch, at, results)

    def _try_out(self) -> None:
        """See that a send which cannot be made ends at once, with its error. Raises `OSError` if not."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            descriptors, addresses = array("i", (ours.fileno(), -1)), array("Q", (self.queues.stage_address,) * 2)
            sizes = array("i", (1024, 1024))
            results = set(self.queues.exchange(descriptors * 64, addresses * 64, sizes * 64) or ())
        if results != {1024, -errno.EAGAIN, -errno.EBADF}:
            raise OSError(errno.ENOSYS, f"sends through io_uring had other results than expected: {sorted(results)}")


def open_ring() -> SendRing | None:
    """Return a ring, or None where io_uring cannot be used; the log says why."""
    try:
        return SendRing()
    except (OSError, MemoryError) as error:  # MemoryError: ctypes where no memory may be executable
        log.info(Event("io_uring is not used", reason=getattr(error, "strerror", str(error))))
        return None


def _deal_with_all(batch: Batch, at: int, results: Sequence[int]) -> None:
    """Deal with the results of the batch's sends from number `at` on: a send may take a part, fail, or not be made."""
    sends = [(each, data) for data, roster, start, stop in batch for each in roster[start:stop]]
    for (subscriber, data), result in zip(sends[at : at + len(results)], results, strict=True):
        if result != len(data):
            subscriber.write(data, max(result, 0))  # what failed here fails there as well, and is dealt with
