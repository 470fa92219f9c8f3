"""Who may publish: the users and groups that the configuration lets in, by what the kernel says of the peer."""

from __future__ import annotations

from realtimed.config.settings import Config
from realtimed.net.stream import QueuedStream

__all__ = ["why_forbidden"]


def why_forbidden(config: Config, stream: QueuedStream) -> str | None:
    """Return why the process at the other end of `stream` may do nothing, as a sentence; None if it may publish."""
    if not config.allow_user and not config.allow_group:
        return None
    _, uid, gid = stream.peer_credentials() or (0, -1, -1)
    if uid in config.allow_user or not stream.peer_groups().isdisjoint(config.allow_group):
        return None
    return (
        "this daemon serves only the users of allow-user and the groups of allow-group;"
        f" you are user {uid} of group {gid}"
    )
