"""Ends the publishers that hold most memory, when all of them together hold too much."""

from __future__ import annotations

from typing import Final

import trio

from realtimed.control.service import Publisher, Service

__all__ = ["shed_largest"]

_SHED_TO: Final = 0.9
"""The share of `max-answers-total` that is held at most after connections have been ended."""

_SHED_INTERVAL: Final = 1.0
"""Seconds until the next look, if too much is held and no connection is left that holds anything."""


async def shed_largest(service: Service) -> None:
    """Whenever all connections together hold too much, end those that hold most. Never returns."""
    answers = service.answers
    while True:
        await answers.exceeded()
        if not await _shed(service):
            await trio.sleep(_SHED_INTERVAL)


async def _shed(service: Service) -> bool:
    """End connections and wait until they are gone; return whether there were any.

    A function of its own, since what it refers to stays in memory, and the next time may be days away.
    """
    ended = _end_largest(service)
    while not service.connections.isdisjoint(ended):
        await service.finished.park()
    return bool(ended)


def _end_largest(service: Service) -> list[Publisher]:
    """End connections until enough memory will be free; return them."""
    answers = service.answers
    held = answers.held
    excess = held - int(answers.total_limit * _SHED_TO)
    holding = sorted((each for each in service.connections if each.burden), key=lambda each: each.burden)
    ended = []
    while holding and excess > 0:
        largest = holding.pop()
        excess -= largest.burden
        largest.end_now(
            "too_much",
            f"it holds {largest.burden} bytes with answers that it has not read and commands that it has not finished,"
            f" and all publishers hold {held}; the limit, max-answers-total, is {answers.total_limit}",
        )
        ended.append(largest)
    return ended
