"""Exceptions that come into a call of the client between any two instructions, as signal handlers raise them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest

import realtimed.client
import realtimed.rpc
from realtimed import Client, Position, ProtocolError, Receipt, Subscription
from realtimed.client.line import KEPT
from tests.kit.blocking import daemon_in_thread
from tests.kit.patience import PATIENCE
from tests.kit.stack import ROOT, Daemon, runtime_directory

INTERRUPTS: Final = int(os.environ.get("INTERRUPTS", "1500"))
"""Interrupts at random moments, in each way; more: INTERRUPTS=30000 pytest tests/client/test_interrupts.py"""

EVERY: Final = 1 if INTERRUPTS >= 30_000 else 7
"""One in this many instructions of a call is interrupted."""

CLIENT: Final = (*realtimed.client.__path__, *realtimed.rpc.__path__)

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning"  # a socket that only its finalizer can close says so, and that is what happens here
)


class Interrupted(BaseException):
    """What a signal handler raises."""


@pytest.fixture(scope="module", name="daemon")
def shared_daemon() -> Iterator[Daemon]:
    with runtime_directory() as directory, daemon_in_thread(directory) as running:
        yield running


def descriptors() -> int:
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def interrupted_at(instruction: int, call: Callable[[], object]) -> bool:
    """Make a call and raise `Interrupted` before the instruction of that number. Return whether there is one.

    Instructions of the client's own modules are counted, and of nothing else.
    """
    left = instruction

    def trace(frame: FrameType, event: str, _argument: Any) -> Callable[..., Any] | None:
        nonlocal left
        if not frame.f_code.co_filename.startswith(CLIENT):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False


def each_instruction(call: Callable[[], object]) -> Iterator[int]:
    """Make a call again and again, interrupted at one instruction after the other, and at last not at all."""
    instruction = 0
    while interrupted_at(instruction, call):
        yield instruction
        instruction += EVERY
    assert instruction > 100, "nothing was interrupted"


def test_a_call_that_is_interrupted_at_any_instruction_harms_no_other(daemon: Daemon) -> None:
    with Client(daemon.control_socket) as client:
        client.broadcast_each([("a", "of a"), ("b", "of b")])
        before = descriptors()
        for instruction in each_instruction(lambda: client.history("a", 1)):
            assert client.history("b", 1).messages[0].message == "of b", instruction
        assert descriptors() <= before + KEPT
        client.close()
        assert descriptors() <= before


def test_a_first_call_that_is_interrupted_at_any_instruction_leaves_nothing_open(daemon: Daemon) -> None:
    def only_call() -> None:
        client = Client(daemon.control_socket)
        try:
            client.ping()
        finally:
            client.close()

    only_call()
    before = descriptors()
    for instruction in each_instruction(only_call):
        assert instruction % (10 * EVERY) or descriptors() <= before, instruction
    assert descriptors() <= before


def test_a_subscription_that_is_interrupted_at_any_instruction_leaves_nothing_open(daemon: Daemon) -> None:
    def subscribe() -> None:
        with client.subscribe("news"):
            pass

    with Client(daemon.control_socket) as client:
        client.ping()
        subscribe()
        before = descriptors()
        for instruction in each_instruction(subscribe):
            assert instruction % (10 * EVERY) or descriptors() <= before, instruction
        assert descriptors() <= before


def test_a_receive_that_is_interrupted_loses_no_message_silently(daemon: Daemon) -> None:
    """It is received by the next one; or that one raises, since messages may be lost, and says how to get them."""
    with Client(daemon.control_socket) as client:

        def sent() -> Receipt:
            return client.broadcast("news", "hello")

        def missed(seen: Mapping[str, Position]) -> int:
            """Subscribe again; return the offset of the one message that comes."""
            with client.subscribe("news", since=seen) as again:
                assert again.recovered == {"news": True}
                message = again.receive(PATIENCE)
                assert message is not None
                return message.offset

        def follow(subscription: Subscription, instruction: int) -> bool:
            last = sent().offset
            more = interrupted_at(instruction, lambda: subscription.receive(PATIENCE))
            if subscription.seen["news"].offset < last:
                try:
                    message = subscription.receive(PATIENCE)
                except ProtocolError as error:
                    text = str(error)
                else:
                    return message is not None and message[:3] == ("news", "hello", last)
                assert "Subscribe again, with since=seen" in text
                assert missed(subscription.seen) == last
                torn.append(instruction)
            return more

        torn: list[int] = []
        instruction = 0
        more = True
        while more:
            with client.subscribe("news") as subscription:
                more = follow(subscription, instruction)
            instruction += EVERY
        assert instruction > 100
        assert torn


def test_a_call_within_a_call_is_made_at_once_wherever_that_is(daemon: Daemon) -> None:
    """A signal handler and a finalizer may use the client that was interrupted."""
    with Client(daemon.control_socket) as client:
        client.broadcast_each([("a", "of a"), ("b", "of b")])

        def outer() -> None:
            assert client.history("a", 1).messages[0].message == "of a"

        for instruction in range(0, 10_000, 3 * EVERY):
            reached: list[str] = []

            def inner(reached: list[str] = reached) -> None:
                [found] = client.history("b", 1).messages
                reached.append(str(found.message))

            called_at(instruction, inner, outer)
            if not reached:
                break
            assert reached == ["of b"]
        else:
            raise AssertionError("the call never ends")
        assert instruction > 100


def called_at(instruction: int, inner: Callable[[], None], outer: Callable[[], None]) -> None:
    """Make the call `outer`, and within it, before the instruction of that number, the call `inner`."""
    left = instruction

    def trace(frame: FrameType, event: str, _argument: Any) -> Callable[..., Any] | None:
        nonlocal left
        if not frame.f_code.co_filename.startswith(CLIENT):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == -1:
                inner()  # no code is traced while a trace function runs
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        outer()
    finally:
        sys.settrace(before)


# Interrupted by a real signal, at random moments. The main thread's calls are ended by exceptions, or have others made
# in the middle of them; every answer has to be the one to its own question.
RANDOM = """
import gc, os, random, signal, sys, threading
from pathlib import Path
import realtimed.client.connection
from realtimed import Client

path, interrupts, helpers, seed = sys.argv[1], *map(int, sys.argv[2:])
print("seed", seed)
chance = random.Random(seed)
names = [f"own:{number}" for number in range(10)]

class Interrupted(BaseException):
    pass

def descriptors():
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))

def ask(client, chance):
    name = chance.choice(names)
    match chance.randrange(5):
        case 0:
            assert len(client.broadcast_many(["x"] * (count := chance.randrange(1, 9)), "hello")) == count
        case 1:
            assert all(type(each).__name__ == "Receipt" for each in client.broadcast_each([("x", name)] * 20))
        case 2:
            with client.subscribe(name, "x") as subscription:
                assert set(subscription.positions) == {name, "x"}
                subscription.receive(0)
        case _:
            assert [each.message for each in client.history(name, 1).messages] == [name]

def help():
    chance = random.Random(threading.get_ident())
    while not over.is_set():
        try:
            ask(client, chance)
        except BaseException as error:
            failures.append(error)
            raise

def interrupt(number, frame):
    global nested
    if chance.random() < 0.2:
        ask(client, random.Random(chance.random()))
        nested += 1
    raise Interrupted

nested, failures, over = 0, [], threading.Event()
before = descriptors()
client = Client(path, timeout=60)
client.broadcast_each((name, name) for name in names)
threads = [threading.Thread(target=help) for _ in range(helpers)]
for thread in threads:
    thread.start()
signal.signal(signal.SIGALRM, interrupt)
for count in range(interrupts):
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 1e-3))
        for _ in range(10_000):
            ask(client, chance)
        raise AssertionError("an exception has got lost")
    except Interrupted:
        pass
    assert not failures, failures
    if count % 500 == 0:
        assert descriptors() <= before + 8 + 6 * (helpers + 1), descriptors()
over.set()
for thread in threads:
    thread.join()
assert not failures, failures
assert nested > interrupts // 10
for name in names:
    assert client.history(name, 1).messages[0].message == name
kept = descriptors() - before
assert 1 <= kept <= 8, kept
client.close()
assert descriptors() == before, (descriptors(), before)
assert len(realtimed.client.connection._opened) <= 2 * 64 + 8
print("done")
"""


@pytest.mark.parametrize("helpers", [0, 3], ids=["alone", "with other threads"])
def test_calls_that_are_interrupted_at_random_moments(daemon: Daemon, helpers: int) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    arguments = [str(daemon.control_socket), str(INTERRUPTS), str(helpers), str(seed)]
    done = subprocess.run(
        [sys.executable, "-c", RANDOM, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60 + INTERRUPTS / 50,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout == f"seed {seed}\ndone\n"
