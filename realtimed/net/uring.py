"""Sends to many sockets in one system call, through io_uring (Linux 5.19 and later).

The fan-out's loop in Python spends a fifth of its time between two calls of `socket.send`. Here the kernel runs the
loop. The bytes are copied once to memory that the kernel reads. A batch of sends is three columns of numbers (which
socket, where its bytes are, how many). Each column is written by a slice assignment, unless it equals the last one.

Every send is non-blocking and has ended when `io_uring_enter` returns. So nothing is ever in flight between two calls,
no buffer has to outlive a call, and a closed descriptor cannot be mistaken for its successor. Where the kernel has no
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

# These numbers are the same on every architecture: they come from after the unification of the system call tables.
_SETUP: Final = 425
_ENTER: Final = 426

_SUBMIT_ALL: Final = 1 << 7  # Linux 5.18: a failed send does not stop those behind it
_COOPERATE: Final = 1 << 8  # Linux 5.19: no interrupts for completions; we look for them ourselves
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
"""The completions of `_ENTRIES` submissions without their results, which belong at every fourth index from 2 on."""

_STAGE: Final = 2**20
"""Bytes that can be sent in one go: as a rule, more than a slice of a round has. A larger batch is halved."""

_WORTHWHILE: Final = 16
"""The fewest sends for which the ring is faster than the loop (measured). With everything in the processor's caches it
takes twice as many. But between two rounds of many channels nothing stays in the caches, and the ring reads less."""

_FEW: Final = 8
"""For at most this many receivers a column grows faster by a list than by a multiplied array (measured)."""


class _Column:
    """One field of all submissions. Often the same values come again; they are not written twice."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._values = array(memory.format)

    def write(self, values: array[int]) -> bool:
        """Set the field of the first submissions. Return whether it changed. The caller must not change `values`."""
        if values == self._values:
            return False
        self._memory[: len(values)] = memoryview(values)
        self._values = values
        return True


class _Queues:
    """The memory shared with the kernel, and the columns in it that are used here."""

    # Invariants: all of the memory is mapped as long as this object lives. Both queues are empty except within
    # `exchange`. Send number i of a call uses submission i, which always carries i as its user data; the queue holds
    # the numbers of submissions. `_expected` is the completions of submissions with the sizes in `_sizes` if everything
    # is sent.

    def __init__(self) -> None:
        # Import it only here: that can fail where no memory may be both writable and executable.
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
        """Send to each of at most `_ENTRIES` descriptors a number of bytes from an address on the stage.

        Returns None if every descriptor took all its bytes. Otherwise returns the result of each: the bytes taken, or a
        negative error number, ``-EBADF`` for a send that the kernel did not try. The caller may no longer change the
        arrays.
        """
        count = len(descriptors)
        self._descriptors.write(descriptors)
        self._addresses.write(addresses)
        if self._sizes.write(sizes):
            expected = _ALL_COMPLETED[: 4 * count]
            expected[2::4] = sizes
            self._expected = expected.tobytes()
        completed = self._completed(self._submit(count))
        if completed == self._expected:
            return None
        if array("Q", completed)[::2] == _IN_PLACE[:count]:
            return array("i", completed)[2::4]
        results = array("i", (-errno.EBADF,)) * count
        for number, result, _ in _COMPLETION.iter_unpack(completed):
            results[number] = result
        return results

    def _submit(self, count: int) -> int:
        """Have the kernel make the first `count` sends. Return how many it made."""
        tail = self._tail[0]
        start = tail % _ENTRIES
        before_end = min(count, _ENTRIES - start)
        self._queue[start : start + before_end] = _NUMBERS[:before_end]
        self._queue[: count - before_end] = _NUMBERS[before_end:count]
        self._tail[0] = (tail + count) % _WRAP
        try:
            taken = self.call(_ENTER, self.fd, count)
        except OSError:
            taken = 0
        if taken < count:
            self._tail[0] = self._head[0]
        return taken

    def _completed(self, count: int) -> bytes:
        """Take `count` completions out of their queue, which may wrap around."""
        head = self._completed_head[0]
        while (self._completed_tail[0] - head) % _WRAP < count:  # never seen: a send that does not wait ends at once
            with suppress(InterruptedError):
                self.call(_ENTER, self.fd, 0, count, _GET_EVENTS)
        start = head % self._completions
        before_end = min(count, self._completions - start)
        raw = self._events[_COMPLETION.size * start : _COMPLETION.size * (start + before_end)].tobytes()
        raw += self._events[: _COMPLETION.size * (count - before_end)].tobytes()
        self._completed_head[0] = (head + count) % _WRAP
        return raw

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
    """Does what `realtimed.hub.rounds.send_each` does, with up to `_ENTRIES` sends in one system call.

    Raises `OSError` if the kernel does not offer it or behaves unexpectedly, and `MemoryError` if the system does not
    let Python call functions of C.
    """

    def __init__(self) -> None:
        self.queues = _Queues()
        try:
            self._try_out()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptor. The ring cannot be used any more."""
        os.close(self.queues.fd)

    def __call__(self, batch: Batch) -> None:
        """Send each subscriber its data. What the kernel does not take is handled as in `send_each`."""
        if len(batch) < _WORTHWHILE and sum([stop - start for _, _, start, stop in batch]) < _WORTHWHILE:
            send_each(batch)
        else:
            self._send_halved(batch)

    def _send_halved(self, batch: Batch) -> None:
        """Send a batch, halved until each part fits on the stage. A single message that does not fit skips the ring."""
        if sum([len(part[0]) for part in batch]) <= _STAGE:
            self._send(batch)
        elif len(batch) == 1:
            send_each(batch)
        else:
            middle = len(batch) // 2
            self(batch[:middle])
            self(batch[middle:])

    def _send(self, batch: Batch) -> None:
        """Send a batch that fits on the stage, in as few system calls as possible."""
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
                _write_rest(batch, at, results)

    def _try_out(self) -> None:
        """Check that a send that would block ends at once with its error. Raises `OSError` if it does not."""
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
    """Return a ring. Where io_uring cannot be used, log why and return None."""
    try:
        return SendRing()
    except (OSError, MemoryError) as error:  # ctypes raises MemoryError where no memory may be executable
        log.info(Event("io_uring is not used", reason=getattr(error, "strerror", str(error))))
        return None


def _write_rest(batch: Batch, at: int, results: Sequence[int]) -> None:
    """Write what the batch's sends from number `at` on have not sent: a send may take a part, fail, or not be made."""
    sends = [(each, data) for data, roster, start, stop in batch for each in roster[start:stop]]
    for (subscriber, data), result in zip(sends[at : at + len(results)], results, strict=True):
        if result != len(data):
            subscriber.write(data, max(result, 0))  # a send that failed fails there too, and is handled
