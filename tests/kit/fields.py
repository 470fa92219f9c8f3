"""Which fields an object has, and what becomes of each in an upgrade."""

from __future__ import annotations

from collections.abc import Collection, Mapping

__all__ = ["check_fields", "fields_of"]


def fields_of(each: object) -> set[str]:
    """Return the names of all fields of an object, or of all that an instance of a class with slots may have."""
    cls = each if isinstance(each, type) else type(each)
    slots = {name for base in cls.__mro__ for name in _slots(base)}
    return slots | set(vars(each) if not isinstance(each, type) and hasattr(each, "__dict__") else ())


def _slots(cls: type) -> Collection[str]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else slots


def check_fields(each: object, *, handed_over: Collection[str], made_again: Mapping[str, str]) -> None:
    """Fail unless every field is handed over, or named as made again, with how."""
    fields = fields_of(each) - {"__dict__", "__weakref__"}
    assert not set(handed_over) & set(made_again)
    assert fields == set(handed_over) | set(made_again), "a field is neither handed over nor named as made again"
    assert all(made_again.values()), "say how"
