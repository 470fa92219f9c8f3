"""Many at once: crowds that come, leave and publish in the middle of a round, in an order that nobody expects."""

from __future__ import annotations

from dataclasses import dataclass, field

from realtimed.hub.hub import Hub
from tests.kit.hubs import fan_out, make_hub
from tests.kit.subscribers import Listener

CROWD = 500


def test_a_crowd_that_leaves_in_the_middle_of_a_round_last_come_first_has_what_was_published_before() -> None:
    hub = make_hub()
    crowd = [Listener() for _ in range(CROWD)]
    for each in crowd:
        hub.subscribe(each, "news")
        hub.subscribe(each, "sport")
    hub.publish("news", "1")
    hub.publish("sport", "2")
    turn = hub.next_round()
    assert turn is not None
    assert turn.step(CROWD // 4)
    for each in reversed(crowd[::2]):
        hub.unsubscribe(each, "news")
        hub.subscribe(each, "late")
    hub.publish("news", "3")
    hub.publish("late", "4")
    for each in reversed(crowd[1::2]):
        hub.leave(each)
    while turn.step(7):
        pass
    fan_out(hub)
    assert {tuple(each.messages) for each in crowd[::2]} == {("1", "2", "4")}
    assert {tuple(each.messages) for each in crowd[1::2]} <= {("1", "2"), ("1", "2", "3"), ()}
    assert hub.channels["sport"].count == hub.channels["late"].count == CROWD // 2
    assert "news" not in hub.channels
    assert hub.idle


@dataclass(eq=False)
class Leaving(Listener):
    """One that leaves over the first message, takes a neighbour along, and lets another in."""

    hub: Hub = field(default_factory=make_hub)
    neighbour: Listener = field(default_factory=Listener)
    successor: Listener = field(default_factory=Listener)

    def take(self, data: bytes) -> None:
        super().take(data)
        self.hub.leave(self)
        self.hub.leave(self.neighbour)
        self.hub.subscribe(self.successor, "news")


def test_those_who_leave_over_a_message_and_take_others_along_harm_nobody_else() -> None:
    hub = make_hub()
    staying, neighbours, successors = ([Listener() for _ in range(CROWD)] for _ in range(3))
    leaving = [Leaving(hub=hub, neighbour=n, successor=s) for n, s in zip(neighbours, successors, strict=True)]
    for group in zip(neighbours, leaving, staying, strict=True):
        for each in group:
            hub.subscribe(each, "news")
    hub.publish("news", "1")
    fan_out(hub)
    hub.publish("news", "2")
    fan_out(hub)
    assert {tuple(each.messages) for each in staying} == {("1", "2")}
    assert {tuple(each.messages) for each in leaving} == {("1",)}
    assert {tuple(each.messages) for each in successors} == {("2",)}
    assert {tuple(each.messages) for each in neighbours} <= {(), ("1",)}
    assert hub.channels["news"].count == 2 * CROWD
