"""Daemons with settings of their own that the tests of the specification share."""

from __future__ import annotations

import pytest

from tests.kit.peers import LIVELY, STRICT, Daemons
from tests.kit.stack import Daemon


@pytest.fixture(scope="module")
def shared(daemons: Daemons) -> Daemon:
    return daemons.get({})


@pytest.fixture(scope="module")
def lively(daemons: Daemons) -> Daemon:
    return daemons.get(LIVELY)


@pytest.fixture(scope="module")
def narrow(daemons: Daemons) -> Daemon:
    return daemons.get({"max_connections": 2})


@pytest.fixture(scope="module")
def ten(daemons: Daemons) -> Daemon:
    return daemons.get({"max_connections": 10})


@pytest.fixture(scope="module")
def one_each(daemons: Daemons) -> Daemon:
    """A daemon where each address may have one connection."""
    return daemons.get({"max_connections_per_address": 1})


@pytest.fixture(scope="module")
def slow_going(daemons: Daemons) -> Daemon:
    """A daemon where each address may make two handshakes, and another one every five seconds."""
    return daemons.get({"handshakes_per_address": 0.2})


@pytest.fixture(scope="module")
def strict(daemons: Daemons) -> Daemon:
    """A daemon with low limits and short deadlines."""
    return daemons.get(STRICT)
