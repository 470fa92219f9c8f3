"""The Python client that blocks: interrupts, threads, forks, and the connections that it keeps."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest

from realtimed import Client
from realtimed.client.line import KEPT
from tests.kit.blocking import daemon_in_thread
from tests.kit.fake_daemon import FakeDaemon, Peer, healthy
from tests.kit.patience import PATIENCE, until
from tests.kit.python import run_python
from tests.kit.stack import Daemon


@pytest.fixture(scope="module")
def daemon(shared_daemon: Daemon) -> Daemon:
    return shared_daemon


def test_an_interrupted_call_cannot_leave_its_answer_to_the_next_one(path: Path) -> None:
    def late(peer: Peer) -> None:
        request = peer.request()
        os.kill(os.getpid(), signal.SIGALRM)
        peer.wait_until_it_hangs_up()
        with pytest.raises(BrokenPipeError):
            peer.receipt(request, 1)

    class Interrupted(BaseException):
        pass

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with FakeDaemon(path, late, healthy), Client(path) as client:
            with pytest.raises(Interrupted):
                client.broadcast("news", "one")
            assert client.broadcast("news", "two").offset == 2
    finally:
        signal.signal(signal.SIGALRM, before)


LONG = "x" * 70_000
"""A message that goes out before the next is asked for: then the call is under way, on a connection."""


def test_no_call_waits_for_another(daemon: Daemon) -> None:
    """Those of another thread go on meanwhile, and those that are made in the middle of a call of the same thread."""
    begun, over = threading.Event(), threading.Event()

    def pairs() -> Iterator[tuple[str, str]]:
        yield "news", LONG
        client.ping()
        begun.set()
        assert over.wait(PATIENCE)

    with Client(daemon.control_socket, timeout=PATIENCE) as client:
        other = threading.Thread(target=client.broadcast_each, args=[pairs()])
        other.start()
        assert begun.wait(PATIENCE)
        began = time.monotonic()
        client.ping()
        assert time.monotonic() - began < PATIENCE / 2
        over.set()
        other.join()


def test_a_bounded_number_of_connections_is_kept(path: Path) -> None:
    """A call that is within another, within another, and so on, has each time a connection of its own."""
    depth = 3 * KEPT

    def nested(client: Client, left: int) -> Iterator[tuple[str, str]]:
        yield "news", LONG
        if left:
            client.broadcast_each(nested(client, left - 1))

    with FakeDaemon(path, *[healthy] * depth) as fake, Client(path) as client:
        before = descriptors()
        client.broadcast_each(nested(client, depth - 1))
        assert fake.connections == depth
        until(lambda: descriptors() <= before + 2 * KEPT)  # the stand-in's side, too
        client.broadcast("news", "hello")
        assert fake.connections == depth


def test_close_leaves_a_call_that_is_under_way_its_connection(path: Path) -> None:
    def pairs() -> Iterator[tuple[str, str]]:
        yield "news", LONG
        client.close()
        yield "news", "two"

    with FakeDaemon(path, healthy, healthy) as fake, Client(path) as client:
        assert len(client.broadcast_each(pairs())) == 2
        assert fake.connections == 1
        client.broadcast("news", "three")  # the first connection was closed when its call had ended
        assert fake.connections == 2


FORKING = """
import os, sys, threading, warnings
from realtimed import Client, broadcast

warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: a process with threads forks
path = sys.argv[1]
client = Client(path)
publishers = client.stats()["publishers"]
broadcast("news", "parent", socket=path)

def hold():
    def pairs():
        begun.set()
        over.wait()
        yield "news", "from the thread"
    client.broadcast_each(pairs())

begun, over = threading.Event(), threading.Event()
thread = threading.Thread(target=hold)
thread.start()
begun.wait()
child = os.fork()  # while another thread has its turn
if child == 0:
    assert client.broadcast("news", "child").offset == 1
    assert broadcast("news", "child", socket=path).offset == 1
    assert client.stats()["publishers"] == publishers + 3, client.stats()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
over.set()
thread.join()
assert client.broadcast("news", "parent").offset == 1
assert client.stats()["publishers"] == publishers + 1, client.stats()
client.close()
print("done")
"""


def test_a_forked_child_opens_connections_of_its_own(runtime_dir: Path) -> None:
    with daemon_in_thread(runtime_dir, "--history-size", "0") as daemon:
        assert run_python(FORKING, str(daemon.control_socket)) == "done\n"


FORKED_IN_USE = """
import os, stat, sys, threading, warnings
from realtimed import Client, NoDaemonError

warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: a process with threads forks

def sockets():
    descriptors = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(each) and stat.S_ISSOCK(os.stat(each).st_mode) for each in descriptors)

def pairs():
    yield "other", "x" * 70_000
    begun.set()
    over.wait()

client = Client(sys.argv[1])
client.ping()
begun, over = threading.Event(), threading.Event()
thread = threading.Thread(target=client.broadcast_each, args=[pairs()], daemon=True)
with client.subscribe("news") as subscription:
    thread.start()
    begun.wait()
    assert sockets() == 2
    child = os.fork()
    if child == 0:
        assert sockets() == 0, sockets()  # what a child kept open, the daemon would go on serving
        try:
            subscription.receive(0)
        except NoDaemonError as error:
            assert str(error).endswith("after a fork, subscribe again"), error
        else:
            raise AssertionError("the child takes the messages of the parent")
        client.broadcast("news", "of the child")
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    print(subscription.receive(10).message)
    over.set()
    thread.join()
client.close()
"""


def test_a_forked_child_has_none_of_the_connections_that_were_in_use(daemon: Daemon) -> None:
    assert run_python(FORKED_IN_USE, str(daemon.control_socket)) == "of the child\n"


def test_a_closed_connection_ends_though_another_process_has_a_copy_of_it(path: Path) -> None:
    """As a child has that was forked by no Python code, or that has not come to close it yet."""
    heard_of_the_end = threading.Event()

    def listening_to_the_end(peer: Peer) -> None:
        healthy(peer)
        heard_of_the_end.set()

    with FakeDaemon(path, listening_to_the_end), Client(path) as client:
        client.broadcast("news", "hello")
        child = subprocess.Popen(
            ["sleep", str(3 * PATIENCE)], pass_fds=[each for each in range(3, 100) if is_socket(each)]
        )
        try:
            client.close()
            assert heard_of_the_end.wait(PATIENCE / 2)
        finally:
            child.kill()
            child.wait()


def is_socket(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        return False


SHARED = """
import sys
from threading import Thread
from realtimed import Client, broadcast

with Client() as client:
    publishers = client.stats()["publishers"]
    threads = [Thread(target=broadcast, args=("news", "hello")) for _ in range(20)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    while not 1 <= client.stats()["publishers"] - publishers <= 8:  # the daemon notices a little later
        pass
    print(broadcast("news", b"hello", socket=client.socket))
"""


def test_broadcast_keeps_some_connections_and_closes_them_at_the_end(runtime_dir: Path) -> None:
    with daemon_in_thread(runtime_dir) as daemon:
        output = run_python(SHARED, REALTIME_SOCKET=str(daemon.control_socket))

    assert output.startswith("Receipt(recipients=0, epoch=")


WITHOUT_POLL = """
import select, sys
del select.poll
from realtimed import Client
with Client(sys.argv[1], timeout=30) as client, client.subscribe("news") as subscription:
    print(client.broadcast("news", "x" * 60_000).recipients)
    print(len(subscription.receive(10).message), subscription.receive(0))
"""


UNDER_EVENTLET = """
import warnings
warnings.simplefilter("ignore")
import eventlet
eventlet.monkey_patch()
import sys
from realtimed import Client

def count():
    while True:
        turns.append(1)
        eventlet.sleep(0)

turns = []
counting = eventlet.spawn(count)
with Client(sys.argv[1]) as client, client.subscribe("news") as subscription:
    recipients = eventlet.GreenPool().imap(lambda number: client.broadcast("news", str(number)).recipients, range(100))
    print(sum(recipients), len({subscription.receive(10).message for _ in range(100)}))
    turns.clear()
    print(subscription.receive(0.1), len(turns) > 1)
"""


def test_a_client_does_without_poll(daemon: Daemon) -> None:
    assert run_python(WITHOUT_POLL, str(daemon.control_socket)) == "1\n60000 None\n"


def test_calls_under_eventlet_let_its_other_threads_go_on(daemon: Daemon) -> None:
    assert run_python(UNDER_EVENTLET, str(daemon.control_socket), strict=False) == "100 100\nNone True\n"


def descriptors() -> int:
    """Return how many open files this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
