"""The two forms in which connections of the control socket get publications: with the time of publication or without.

Pure: no connection, no socket, no task.
"""

from __future__ import annotations

from typing import Final

from realtimed.hub.publication import Publication, WireFormat
from realtimed.rpc.wire import encode_notification

__all__ = ["FORMS", "WITHOUT_TIME", "WITH_TIME"]


class _WithoutTime:
    def encode(self, publication: Publication) -> bytes:
        return encode_notification("message", (publication.channel, publication.message, publication.offset))


class _WithTime:
    def encode(self, publication: Publication) -> bytes:
        more = {"time": publication.time}
        return encode_notification("message", (publication.channel, publication.message, publication.offset, more))


WITHOUT_TIME: Final[WireFormat] = _WithoutTime()
"""The form for a connection that has not asked for times."""

WITH_TIME: Final[WireFormat] = _WithTime()
"""The form for a connection that has asked for times."""

FORMS: Final = (WITHOUT_TIME, WITH_TIME)
"""All forms. Their order is the same in every version."""
