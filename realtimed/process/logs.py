"""The log: one line for each event, on standard error, as text, as JSON, or for the systemd journal.

An event has a fixed name and named fields. Only this module turns them into text, so text from a peer reaches the log
in one way: escaped, on one line, and bounded in length. All events are listed in ``docs/operations.md``.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from realtimed.process.log_output import LogOutput
from realtimed.text import printable, quoted

__all__ = ["FORMATS", "Event", "catch_up", "configure", "goes_to_journal", "lines_lost"]

_STANDARD_ERROR: Final = 2

_VALUE_LIMIT: Final = 200
"""Characters of a field's value that are logged."""

_BARE: Final = re.compile(r"[A-Za-z0-9_\-.:/@,+%\[\]]+")
"""Values that need no quotes in a line of text."""

_PRIORITIES: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""The journal's levels, see sd-daemon(3)."""


log = logging.getLogger(__name__)


class Event:
    """One line of the log: a fixed name, and fields. Costs little if its level is not logged."""

    __slots__ = ("fields", "name")

    def __init__(self, name: str, /, **fields: str | float | None) -> None:
        self.name = name
        self.fields: Mapping[str, str | float | None] = fields

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name}={_shown(value)}" for name, value in self.fields.items())])


def _shown(value: str | float | None) -> str:
    if value is None:
        return "-"
    if not isinstance(value, str):
        return str(value)
    return value if len(value) <= _VALUE_LIMIT and _BARE.fullmatch(value) else quoted(value, _VALUE_LIMIT)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.fromtimestamp(record.created).isoformat(" ", "milliseconds")
        return "\n".join([f"{stamp} {record.levelname} {_message(record)}", *_traceback(record)])


class _JournalFormatter(logging.Formatter):
    """The journal takes each line as an entry, reads its level from the prefix, and knows the time."""

    def format(self, record: logging.LogRecord) -> str:
        level = _PRIORITIES.get(record.levelno, 6)
        return "\n".join(f"<{level}>{line}" for line in [_message(record), *_traceback(record)])


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {"time": stamp.replace("+00:00", "Z"), "level": record.levelname.lower()}
        if isinstance(record.msg, Event):
            line["event"] = record.msg.name
            for name, value in record.msg.fields.items():
                line[name] = value[:_VALUE_LIMIT] if isinstance(value, str) else value
        else:
            line |= {"event": "message", "logger": record.name, "message": _message(record)}
        traceback = _traceback(record)
        if traceback:
            line["traceback"] = "\n".join(traceback)
        return json.dumps(line)


def _message(record: logging.LogRecord) -> str:
    return printable(record.getMessage())


def _traceback(record: logging.LogRecord) -> list[str]:
    """Return the lines of the logged exception, if there is one.

    It may quote a peer. Its lines are indented, so none of them looks like an event.
    """
    if not record.exc_info:
        return []
    return ["  " + printable(line) for line in logging.Formatter().formatException(record.exc_info).split("\n")]


FORMATS: Final[Mapping[str, type[logging.Formatter]]] = {
    "text": _TextFormatter,
    "json": _JsonFormatter,
    "journal": _JournalFormatter,
}


def goes_to_journal(environ: Mapping[str, str], fd: int) -> bool:
    """Return whether the file descriptor leads to the systemd journal; see JOURNAL_STREAM in systemd.exec(5)."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False  # it is closed
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def configure(level: str, form: str | None) -> None:
    """Log to standard error from `level` on, in one of `FORMATS`.

    Without a `form` it is ``journal`` if standard error is the journal, else ``text``. Logging never waits for the
    reader: `catch_up` has to be called from time to time.
    """
    if form is None:
        form = "journal" if goes_to_journal(os.environ, _STANDARD_ERROR) else "text"
    handler = logging.StreamHandler(LogOutput(_STANDARD_ERROR))
    handler.setFormatter(FORMATS[form]())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # trio-websocket logs every frame, which helps nobody to debug realtimed.
    logging.getLogger("trio-websocket").setLevel(logging.WARNING)


def lines_lost() -> int:
    """Return how many lines of the log were lost, because a reader was too slow or they could not be written."""
    return sum(output.lost for output in _outputs())


def catch_up() -> bool:
    """Write the lines for which a slow reader has made room, and log how many were lost. Call it from time to time.

    Returns whether lines are still waiting.
    """
    for output in _outputs():
        output.flush()
        lost = output.lost
        if lost > output.reported and not output.pending:
            log.warning(Event("log lines lost", count=lost - output.reported))
            if output.lost == lost:
                output.reported = lost
            else:
                output.lost = lost  # a report that is lost itself does not count
    return any(output.pending for output in _outputs())


def _outputs() -> list[LogOutput]:
    return [
        handler.stream
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and isinstance(handler.stream, LogOutput)
    ]
