"""Places for connections: the limit on all, the limits on one address, and what the table keeps."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter

import pytest

from realtimed.net.admission import LIMITS, AddressEntry, Admission, TurnedAway, counted_as
from tests.kit.hubs import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock(1_000_000.0)


def admitted(admission: Admission, address: str) -> AddressEntry:
    place = admission.admit(address)
    assert isinstance(place, AddressEntry), place
    return place


def turned_away(admission: Admission, address: str) -> TurnedAway:
    why = admission.admit(address)
    assert isinstance(why, TurnedAway)
    return why


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("::FFFF:CB00:7107", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_what_an_address_is_counted_as(address: str, name: str) -> None:
    assert counted_as(address) == name


def test_what_is_no_address_is_refused() -> None:
    for wrong in ("", "localhost", "203.0.113.7:80", "203.0.113.07", "[::1]"):
        with pytest.raises(ValueError, match="does not appear to be"):
            counted_as(wrong)


def test_a_place_is_taken_in_the_step_that_finds_it(clock: Clock) -> None:
    admission = Admission(10, 0, 0, clock)
    places = [admission.admit("") for _ in range(300)]
    assert sum(isinstance(each, AddressEntry) for each in places) == admission.taken == 10
    assert places[-1] == TurnedAway("max_connections", "The limit, max-connections, is 10 connections.", 5)
    assert admission.refused == {**dict.fromkeys(LIMITS, 0), "max_connections": 290}
    for each in places[:10]:
        assert isinstance(each, AddressEntry)
        admission.leave(each)
    assert admission.taken == 0
    admitted(admission, "")


@pytest.mark.parametrize(("limit", "half"), [(1, 1), (2, 1), (3, 2), (10, 5)])
def test_one_address_has_half_by_default(limit: int, half: int, clock: Clock) -> None:
    admission = Admission(limit, None, 0, clock)
    for _ in range(half):
        admitted(admission, "203.0.113.7")
    if half < limit:
        why = turned_away(admission, "::ffff:203.0.113.7")
        assert why[:3] == (
            "max_connections_per_address",
            f"The limit of one address, max-connections-per-address, is {half} connections.",
            5,
        )
        admitted(admission, "203.0.113.8")
    assert admission.taken == half + (half < limit)


def test_the_addresses_of_an_ipv6_network_have_one_limit(clock: Clock) -> None:
    admission = Admission(10, 2, 0, clock)
    admitted(admission, "2001:db8::1")
    admitted(admission, "2001:db8::ffff:1")
    assert turned_away(admission, "2001:db8::2").limit == "max_connections_per_address"
    admitted(admission, "2001:db8:0:1::1")


def test_without_an_address_only_the_limit_on_all_counts(clock: Clock) -> None:
    admission = Admission(10, 1, 0.001, clock)
    for _ in range(10):
        admitted(admission, "")
    assert turned_away(admission, "").limit == "max_connections"
    assert admission.busiest is None


def test_zero_is_no_limit(clock: Clock) -> None:
    admission = Admission(1000, 0, 0, clock)
    for _ in range(1000):
        admitted(admission, "203.0.113.7")
    assert turned_away(admission, "203.0.113.7").limit == "max_connections"


@pytest.mark.parametrize(("rate", "burst"), [(0.01, 1), (0.1, 1), (0.5, 5), (1, 10), (3, 30), (7, 70), (100, 1000)])
def test_handshakes_have_a_rate_and_a_burst_of_ten_seconds(rate: float, burst: int, clock: Clock) -> None:
    admission = Admission(100_000, 0, rate, clock)
    for _ in range(burst):
        admission.leave(admitted(admission, "203.0.113.7"))
    why = turned_away(admission, "203.0.113.7")
    assert why.limit == "handshakes_per_address"
    assert why.sentence == f"The limit of one address, handshakes-per-address, is {rate:g} a second."
    assert why.retry_after == max(round(1 / rate), 1)
    assert turned_away(admission, "203.0.113.7").unlogged == 0, "who is refused is not kept out for longer by asking"
    admitted(admission, "203.0.113.8")
    clock.now += why.retry_after
    for _ in range(max(int(rate), 1)):
        admitted(admission, "203.0.113.7")
    assert turned_away(admission, "203.0.113.7").limit == "handshakes_per_address"


def test_what_is_refused_for_another_limit_uses_up_no_handshake(clock: Clock) -> None:
    admission = Admission(1, 0, 0.1, clock)
    other = admitted(admission, "203.0.113.8")
    assert turned_away(admission, "203.0.113.7").limit == "max_connections"
    assert admission.addresses == 1, "nor does it leave an entry"
    admission.leave(other)
    admitted(admission, "203.0.113.7")


def test_an_entry_goes_with_the_last_connection(clock: Clock) -> None:
    admission = Admission(10, None, 0, clock)
    places = [admitted(admission, f"203.0.113.{number % 2}") for number in range(4)]
    assert admission.addresses == 2
    for each in places[:3]:
        admission.leave(each)
    assert admission.addresses == 1
    admission.leave(places[3])
    assert admission.addresses == 0


def test_an_entry_stays_until_its_handshakes_are_back(clock: Clock) -> None:
    admission = Admission(10, None, 1, clock)
    for _ in range(10):
        admission.leave(admitted(admission, "203.0.113.7"))
    clock.now += 9.9
    admission.leave(admitted(admission, ""))
    assert admission.addresses == 1
    admission.leave(admitted(admission, "203.0.113.8"))
    clock.now += 10
    admitted(admission, "")
    assert admission.addresses == 0


def test_the_table_is_bounded_and_forgets_no_connection(clock: Clock) -> None:
    admission = Admission(100, 2, 0.001, clock)
    held = [admitted(admission, f"198.51.100.{number}") for number in range(50)]
    for number in range(40_000):
        admission.leave(admitted(admission, f"10.0.{number >> 8}.{number & 255}"))
    assert admission.addresses == 50 + 16_384
    assert admission.taken == 50
    assert isinstance(admission.admit("10.0.0.0"), AddressEntry), "the one that has been idle longest is forgotten"
    assert turned_away(admission, "10.0.156.63").limit == "handshakes_per_address", "the one that left last is not"
    clock.now += 1000
    for each in held:
        assert turned_away_for_connections(admission, each.name)
        admission.leave(each)


def turned_away_for_connections(admission: Admission, address: str) -> bool:
    """Take the second place of an address, and see that there is no third."""
    second = admitted(admission, address)
    third = turned_away(admission, address)
    admission.leave(second)
    return third.limit == "max_connections_per_address"


def test_an_entry_costs_what_is_written(clock: Clock) -> None:
    admission = Admission(10_000, None, 1, clock)
    addresses = [f"2001:db8:{number:x}::1" for number in range(10_000)]
    tracemalloc.start()
    try:
        places = [admitted(admission, each) for each in addresses]
        used = tracemalloc.get_traced_memory()[0]
        assert used / 10_000 < 300 + 8  # the list of this test
        for each in places:
            admission.leave(each)
        assert tracemalloc.get_traced_memory()[0] / 10_000 < 300 + 8
    finally:
        tracemalloc.stop()


def test_new_limits_hold_for_newcomers(clock: Clock) -> None:
    admission = Admission(10, None, 0, clock)
    places = [admitted(admission, "203.0.113.7") for _ in range(5)]
    admission.configure(4, None, 0)
    assert (admission.taken, admission.limit, admission.per_address) == (5, 4, 2)
    for each in places[:3]:
        assert turned_away(admission, "203.0.113.7").limit == "max_connections_per_address"
        admission.leave(each)
    turned_away(admission, "203.0.113.7")
    admission.leave(places[3])
    admitted(admission, "203.0.113.7")
    admission.configure(4, 0, 0)
    admitted(admission, "203.0.113.7")


def test_a_new_rate_does_not_keep_anyone_out_for_longer(clock: Clock) -> None:
    admission = Admission(100, 0, 0.001, clock)
    admitted(admission, "203.0.113.7")
    assert turned_away(admission, "203.0.113.7").retry_after == 1000
    admission.configure(100, 0, 2)
    assert turned_away(admission, "203.0.113.7").retry_after == 1
    clock.now += 1
    admitted(admission, "203.0.113.7")
    admission.configure(100, 0, 0)
    admitted(admission, "203.0.113.7")


def test_an_address_is_logged_once_in_a_while(clock: Clock) -> None:
    admission = Admission(10, 1, 0, clock)
    place = admitted(admission, "203.0.113.7")
    assert [turned_away(admission, "203.0.113.7").unlogged for _ in range(100)] == [1] + [0] * 99
    clock.now += 59
    assert turned_away(admission, "203.0.113.7").unlogged == 0
    admission.leave(place)
    place = admitted(admission, "203.0.113.7")
    assert turned_away(admission, "203.0.113.7").unlogged == 0, "a new connection makes no new line"
    clock.now += 1
    assert turned_away(admission, "203.0.113.7").unlogged == 102


def test_many_addresses_make_few_lines(clock: Clock) -> None:
    admission = Admission(1000, 1, 0, clock)
    for number in range(100):
        admitted(admission, f"203.0.113.{number}")
    said = [turned_away(admission, f"203.0.113.{number}").unlogged for number in range(100)]
    assert said == [1] * 10 + [0] * 90
    clock.now += 6
    assert turned_away(admission, "203.0.113.50").unlogged == 91
    assert turned_away(admission, "203.0.113.51").unlogged == 0


@pytest.mark.parametrize("rate", [0, 0.5])
def test_the_busiest_and_the_sums_are_right_whatever_happens(rate: float, clock: Clock) -> None:
    chance = random.Random(1)
    admission = Admission(60, 20, rate, clock)
    places: list[AddressEntry] = []
    for _ in range(20_000):
        clock.now += chance.random()
        address = chance.choice(["", "203.0.113.7", "203.0.113.8", f"198.51.100.{chance.randrange(100)}"])
        if places and chance.random() < 0.5:
            admission.leave(places.pop(chance.randrange(len(places))))
        elif isinstance(place := admission.admit(address), AddressEntry):
            places.append(place)
        counts = Counter(place.name for place in places if place.name)
        assert admission.taken == len(places)
        busiest = admission.busiest
        if busiest is None:
            assert not counts
        else:
            assert counts[busiest.name] == busiest.connections == max(counts.values())
        assert len(counts) <= admission.addresses <= len(counts) + (30 if rate else 0)
    for each in places:
        admission.leave(each)
    clock.now += 100
    for _ in range(100):
        admission.leave(admitted(admission, ""))
    assert (admission.taken, admission.addresses, admission.busiest) == (0, 0, None)
