"""The daemon's figures in the text format of Prometheus. The only user of prometheus_client.

Nothing is counted for this alone: a request reads the counters that the daemon keeps anyway. No label has values that a
peer can invent, so the number of lines is bounded.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from realtimed import __version__
from realtimed.process.histogram import Histogram

__all__ = ["CONTENT_TYPE", "METRICS", "Exposition", "Reading"]

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4

_OTHER: Final = "other"
"""Stands for all close codes that clients and administrators choose."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The source of the metrics: the daemon's ``stats``, its limit on connections, and its two histograms.

    `close_reasons` has the values of the label `reason` by close code.
    """

    stats: Mapping[str, Any]
    close_reasons: Mapping[int, str]
    max_connections: int
    round_times: Histogram
    loop_lag: Histogram


Maker = Callable[[str, str, Reading], Metric]


def _gauge(key: str) -> Maker:
    return lambda name, help, reading: GaugeMetricFamily(name, help, value=reading.stats[key])


def _counter(key: str) -> Maker:
    return lambda name, help, reading: CounterMetricFamily(name, help, value=reading.stats[key])


def _by(label: str, key: str) -> Maker:
    """Make a counter with a label from a statistic that is a map."""

    def make(name: str, help: str, reading: Reading) -> Metric:
        family = CounterMetricFamily(name, help, labels=[label])
        for value, count in reading.stats[key].items():
            family.add_metric([value], count)
        return family

    return make


def _histogram(choose: Callable[[Reading], Histogram]) -> Maker:
    def make(name: str, help: str, reading: Reading) -> Metric:
        times = choose(reading)
        buckets = [("+Inf" if bound == float("inf") else str(bound), count) for bound, count in times.cumulative()]
        return HistogramMetricFamily(name, help, buckets=buckets, sum_value=times.sum)

    return make


def _limit(name: str, help: str, reading: Reading) -> Metric:
    return GaugeMetricFamily(name, help, value=reading.max_connections)


def _disconnects(name: str, help: str, reading: Reading) -> Metric:
    reasons = {str(code): reason for code, reason in reading.close_reasons.items()} | {_OTHER: _OTHER}
    counts = dict.fromkeys(reasons, 0)
    for code, count in reading.stats["closed"].items():
        counts[code if code in counts else _OTHER] += count
    family = CounterMetricFamily(name, help, labels=["code", "reason"])
    for code, count in counts.items():
        family.add_metric([code, reasons[code]], count)
    return family


def _build(name: str, help: str, _: Reading) -> Metric:
    return InfoMetricFamily(
        name, help, {"version": __version__, "python": platform.python_version(), "trio": version("trio")}
    )


METRICS: Final[Mapping[str, tuple[str, Maker]]] = {
    "realtimed_open_connections": ("WebSockets that are open now.", _gauge("clients")),
    "realtimed_max_connections": ("WebSockets that may be open at a time.", _limit),
    "realtimed_connections": ("WebSockets accepted.", _counter("connections")),
    "realtimed_disconnects": ("WebSockets that have ended, by close code.", _disconnects),
    "realtimed_endings": ("WebSockets that have ended, by why they did.", _by("ending", "ended")),
    "realtimed_handshakes_refused": (
        "Requests that did not become WebSockets, by HTTP status.",
        _by("status", "handshakes_refused_with"),
    ),
    "realtimed_handshakes_over_limit": (
        "Valid handshakes that were refused, by the limit that was reached.",
        _by("limit", "handshakes_over_limit"),
    ),
    "realtimed_channels": ("Channels that have subscribers now.", _gauge("channels")),
    "realtimed_history_channels": ("Channels that something is kept of now.", _gauge("history_channels")),
    "realtimed_history_publications": ("Publications that are kept now.", _gauge("history_publications")),
    "realtimed_history_bytes": ("Bytes that count for what is kept now.", _gauge("history_bytes")),
    "realtimed_subscriptions": ("Subscriptions now: each is one client on one channel.", _gauge("subscriptions")),
    "realtimed_publishers": ("Connections on the control socket now.", _gauge("publishers")),
    "realtimed_watchers": ("Connections on the control socket that watch by pattern now.", _gauge("watchers")),
    "realtimed_commands": ("Commands on the control socket, the refused ones included.", _counter("commands")),
    "realtimed_commands_refused": (
        "Commands that were refused, by the code of the error.",
        _by("code", "commands_refused_with"),
    ),
    "realtimed_publications": ("Messages published, those to nobody included.", _counter("publications")),
    "realtimed_deliveries": ("Messages times the subscribers they were queued for.", _counter("deliveries")),
    "realtimed_sends": ("Sends of the fan-out: each brings one subscriber one or more messages.", _counter("sends")),
    "realtimed_sent_bytes": ("Bytes of these sends.", _counter("sent_bytes")),
    "realtimed_rounds": ("Rounds of the fan-out.", _counter("rounds")),
    "realtimed_round_seconds": (
        "How long a round of the fan-out took, until its last send.",
        _histogram(lambda reading: reading.round_times),
    ),
    "realtimed_unsent_publication_bytes": (
        "Bytes of memory for messages that wait for the next round or for watchers now.",
        _gauge("unsent_bytes"),
    ),
    "realtimed_backlogged_connections": ("Clients that something waits for now.", _gauge("backlogged")),
    "realtimed_backlog_bytes": ("Bytes of memory for what waits for slow clients now.", _gauge("backlog_bytes")),
    "realtimed_answers_bytes": ("Bytes of memory for what publishers hold now.", _gauge("answers_bytes")),
    "realtimed_idempotency_key_bytes": ("Bytes of memory for idempotency keys now.", _gauge("keys_bytes")),
    "realtimed_event_loop_lag_seconds": (
        "How much later than due a task ran, measured once a second.",
        _histogram(lambda reading: reading.loop_lag),
    ),
    "realtimed_log_lines_lost": ("Lines of the log that could not be written.", _counter("log_lines_lost")),
    "realtimed_build": ("Versions.", _build),
}
"""The metrics by name, without the suffixes that Prometheus adds: ``_total``, ``_info``, ``_bucket`` and so on."""


class Exposition(Collector):
    """Renders the page that Prometheus reads. Each time it takes a new reading."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read
        self._process = ProcessCollector(registry=None)  # memory, processor time, open files and their limit
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def page(self) -> bytes:
        """Return the page."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """See `prometheus_client.registry.Collector`."""
        return []

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        reading = self._read()
        for name, (help, make) in METRICS.items():
            yield make(name, help, reading)
        yield from self._process.collect()
