"""Every field of what a daemon holds passes to the next process, or is named here as made again.

Who adds a field has to say which: a test fails until it is in a list below.
"""

from __future__ import annotations

import socket

from realtimed.config.loading import load
from realtimed.control.server import Connection
from realtimed.daemon import Daemon
from realtimed.hub.channel import Channel
from realtimed.hub.replays import Pieces, Replay
from realtimed.hub.ring import ExpiryQueue, Ring
from realtimed.net.admission import AddressEntry
from realtimed.net.backlog import Backlog
from realtimed.net.head import HeadBuffer
from realtimed.net.stream import QueuedStream
from realtimed.rpc.walker import Walker
from realtimed.rpc.wire import Decoder
from realtimed.websocket.arrival import Arrival
from realtimed.websocket.meter import InboundMeter
from realtimed.websocket.protocols import Conversation
from realtimed.websocket.session import Session
from realtimed.websocket.stream import ClientStream
from realtimed.websocket.unfinished import Unfinished
from tests.kit.fields import check_fields

COUNTED = "follows from what it counts, which goes over"
CONFIGURED = "by the next process's own configuration"
WIRED = "by whoever puts the parts together"
AT_REST = "empty, or as at the beginning, when the daemon has come to rest"
CACHE = "a cache, or a guess that only saves work"
ENDING = "set only when the connection is ending, and then it stays"
WAITS = "tasks that wait in this process"

STREAM = {
    "_backlogs": WIRED,
    "_owner": WIRED,
    "_state": "open, or backlogged if something waits: all others are ending",
    "_timer": "from the deadlines of what waits",
    "fd": "from the socket",
}


def test_channels_and_history() -> None:
    check_fields(
        Channel,
        handed_over={"name", "epoch", "offset", "ring"},
        made_again={
            "number": "in the same order",
            "count": COUNTED,
            "plural": COUNTED,
            "subscribers": "connections subscribe again",
            "_rosters": CACHE,
            "_audience": CACHE,
        },
    )
    check_fields(
        Ring,
        handed_over={"name", "first", "payloads", "times", "published", "evicted", "readers"},
        made_again={
            "count": COUNTED,
            "dropped": CACHE,
            "needed_to": "the newest offset, as nothing is published meanwhile",
            "queue": CONFIGURED,
            "retained": COUNTED,
            "size": CONFIGURED,
        },
    )
    check_fields(
        ExpiryQueue(1.0),
        handed_over={"rings", "offsets", "vacant"},
        made_again={
            "age": CONFIGURED,
            "live": COUNTED,
            "_tidied_rings": CACHE,
            "_tidied_offsets": CACHE,
            "_tidying": CACHE,
        },
    )
    check_fields(
        Replay,
        handed_over={"_answers", "_end", "_missed", "_next"},
        made_again={"_form": "that of the stream", "_replays": WIRED},
    )
    check_fields(Pieces, handed_over={"_frames", "_next", "_replay"}, made_again={})


def test_the_hub() -> None:
    hub = Daemon(load({"io_uring": "off"})).hub
    check_fields(
        hub,
        handed_over={
            "channels", "history", "epochs", "replays", "watchers", "publications", "skipped", "deliveries", "sends",
            "sent_bytes", "rounds",
        },
        made_again={
            "subscribed_channels": COUNTED,
            "subscriptions": COUNTED,
            "max_channels": CONFIGURED,
            "max_message": CONFIGURED,
            "max_subscriptions": CONFIGURED,
            "deliver": WIRED,
            "wake": WIRED,
            "_time_ns": WIRED,
            "_log": AT_REST,
            "_round": AT_REST,
            "_taken": AT_REST,
            "_numbers": "numbers begin anew, in the same order",
        },
    )  # fmt: skip
    check_fields(
        hub.history,
        handed_over={"_queues"},
        made_again={
            "bytes": COUNTED,
            "channels": COUNTED,
            "publications": COUNTED,
            "retained": COUNTED,
            "emptied": WIRED,
            "limit": CONFIGURED,
            "_clock": WIRED,
            "_default": CONFIGURED,
            "_rules": CONFIGURED,
        },
    )
    check_fields(hub.epochs, handed_over={"_run", "_unique", "_forgotten"}, made_again={})
    check_fields(
        hub.replays,
        handed_over={"_frames"},
        made_again={"_adopted": "numbers begin anew", "freed": WIRED, "history": WIRED, "shared": COUNTED},
    )
    check_fields(
        hub.watchers,
        handed_over={"members"},
        made_again={
            "max_patterns": CONFIGURED,
            "queued_bytes": AT_REST,
            "_begin": AT_REST,
            "_changes": AT_REST,
            "_known": CACHE,
            "_marks": "from the patterns",
            "_queue": AT_REST,
            "_search": AT_REST,
        },
    )


def test_what_waits_for_a_peer() -> None:
    check_fields(
        Backlog,
        handed_over={"entries", "_later", "sent", "time", "over_since"},
        made_again={"_backlogs": WIRED, "_replays": COUNTED, "asked": COUNTED, "cost": COUNTED, "size": COUNTED},
    )
    backlogs = Daemon(load({"io_uring": "off"})).backlogs
    check_fields(
        backlogs,
        handed_over=(),
        made_again={
            "asked": COUNTED,
            "shared": COUNTED,
            "streams": COUNTED,
            "total": COUNTED,
            "limit": CONFIGURED,
            "timeout": CONFIGURED,
            "total_limit": CONFIGURED,
            "endings": WAITS,
            "_attendant": WAITS,
            "_discarded": "nobody waits for it",
            "_replays": WIRED,
            "_shared": COUNTED,
            "_turns": WAITS,
            "_waiting": WAITS,
        },
    )
    check_fields(
        QueuedStream,
        handed_over={"_socket", "_backlog", "channels", "form"},
        made_again=STREAM
        | {
            "_gate": WIRED,
            "_nursery": WIRED,
            "_patience": WAITS,
            "_progress": WAITS,
            "heard_at": "nobody looks at it for publishers",
        },
    )


def test_clients() -> None:
    check_fields(
        Session,
        handed_over={
            "id", "stream", "_address", "_conversation", "_inbox", "began_at", "connected_since", "expires_at", "rank",
        },
        made_again={
            "_ending": ENDING,
            "_over": ENDING,
            "_peer_done": ENDING,
            "_hung_up": "the kernel reports it again",
            "_unread": "the kernel reports it again",
            "_place": "admission gives it again",
            "_sessions": WIRED,
            "engine": "another one reads the unfinished message",
            "queued": AT_REST,
        },
    )  # fmt: skip
    check_fields(
        ClientStream,
        handed_over={"_socket", "_backlog", "_full_at", "_limits", "_meter", "channels", "form", "heard_at"},
        made_again=STREAM | {"_drains": WIRED, "_watcher": WIRED},
    )
    check_fields(
        InboundMeter,
        handed_over={"unfinished"},
        made_again={
            "_first": "by a walk over the unfinished message",
            "_fragments": "by a walk over the unfinished message",
            "_header": "by a walk over the unfinished message",
            "_payload": "by a walk over the unfinished message",
            "boundary": "by a walk over the unfinished message",
            "closing": ENDING,
            "frames": "only differences count",
            "messages": "only differences count",
            "limit": "from the client's limits, which go over",
            "too_big": ENDING,
        },
    )
    check_fields(Unfinished, handed_over={"_data"}, made_again={"_allowed": "how much more may come is a guess"})
    check_fields(
        Arrival,
        handed_over={"id", "stream", "_buffer", "_began_at"},
        made_again={"_hung_up": "the kernel reports it again", "_over": ENDING, "_sessions": WIRED},
    )
    check_fields(HeadBuffer, handed_over={"_data"}, made_again={"_limit": WIRED, "head": ENDING, "rest": ENDING})
    check_fields(Conversation, handed_over=(), made_again={"hub": WIRED, "subscriber": WIRED})


def test_all_clients_together() -> None:
    sessions = Daemon(load({"io_uring": "off"})).sessions
    check_fields(
        sessions,
        handed_over={
            "members", "handshakes", "admission", "run_id", "issued", "connections", "refused", "ended", "closed",
            "share",
        },
        made_again={
            "abandoned_parsers": "they stay in this process",
            "announced": "set while a hand-over is under way",
            "backlogs": "each stream's backlog goes over",
            "closings": ENDING,
            "departing": ENDING,
            "config": CONFIGURED,
            "inbound": CONFIGURED,
            "drains": WAITS,
            "engines": "other ones are started",
            "gate": WIRED,
            "hub": WIRED,
            "open": COUNTED,
            "send_away": "set when the daemon stops: then there is no upgrade",
            "_emptied": WAITS,
            "_released": WIRED,
        },
    )  # fmt: skip
    check_fields(
        sessions.admission,
        handed_over={"_table", "_idle", "_unlogged", "refused"},
        made_again={
            "_by_count": COUNTED,
            "_most": COUNTED,
            "_nameless": COUNTED,
            "taken": COUNTED,
            "_clock": WIRED,
            "_lines_full_at": "the log may have a few lines more",
            "_said": "the log may have a few lines more",
            "handshakes": CONFIGURED,
            "limit": CONFIGURED,
            "per_address": CONFIGURED,
        },
    )
    check_fields(AddressEntry, handed_over={"name", "full_at"}, made_again={"connections": COUNTED})


async def test_publishers() -> None:
    daemon = Daemon(load({"io_uring": "off"}))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        check_fields(
            Connection(QueuedStream(ours, daemon.answers), daemon.service),
            handed_over={"stream", "_decoder", "_state", "_began", "_commands", "_refusal_logged", "_upgrade"},
            made_again={
                "first_words": "the answer to whoever has asked for the upgrade",
                "_counted": COUNTED,
                "_dispatch": "access is checked again",
                "_hub": WIRED,
                "_peer": "from the socket",
                "_service": WIRED,
                "_unfinished": AT_REST,
                "_upgrade_over": WAITS,
            },
        )
    check_fields(
        Decoder(1000),
        handed_over={"_data", "_at", "_partial", "_skipping", "_walker"},
        made_again={"_ahead": CACHE, "_scout": CACHE, "limit": CONFIGURED, "max_values": WIRED},
    )
    check_fields(
        Walker,
        handed_over={"_cut", "_missing", "_outer", "_passed", "_payload", "values"},
        made_again={"done": "a walk that is done is forgotten", "owed": COUNTED, "size": COUNTED, "wrong": ENDING},
    )
    check_fields(
        daemon.keyed_receipts,
        handed_over={"_entries"},
        made_again={
            "_clock": WIRED,
            "_under_way": AT_REST,
            "age": CONFIGURED,
            "bytes": COUNTED,
            "limit": CONFIGURED,
        },
    )
    check_fields(
        daemon.service,
        handed_over={"connections", "commands", "refused"},
        made_again={
            "answers": COUNTED,
            "config": CONFIGURED,
            "context": WIRED,
            "finished": WAITS,
            "gate": WIRED,
            "lingering": "set when the daemon stops: then there is no upgrade",
            "publish_now": WIRED,
            "settle": WIRED,
            "stopping": "set when the daemon stops: then there is no upgrade",
            "turns": WAITS,
            "until_publishable": WIRED,
            "_long_query": AT_REST,
        },
    )


def test_figures() -> None:
    daemon = Daemon(load({"io_uring": "off"}))
    check_fields(
        daemon.figures,
        handed_over={"started", "upgrades", "loop_lag", "_began"},
        made_again={
            "config": CONFIGURED,
            "http": "from the socket",
            "hub": WIRED,
            "io_uring": CONFIGURED,
            "service": WIRED,
            "sessions": WIRED,
            "websocket": "from the sockets",
        },
    )
    check_fields(
        daemon.fan_out,
        handed_over={"round_times"},
        made_again={
            "_attended": AT_REST,
            "_began": AT_REST,
            "_give_up": WIRED,
            "_hub": WIRED,
            "_progress": WAITS,
            "_round": AT_REST,
            "_work": WAITS,
        },
    )
