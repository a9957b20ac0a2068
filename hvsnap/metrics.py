"""What Prometheus reads: ``GET /metrics``, under names and units by its conventions (docs/monitoring/README.md).

A reading costs no look at chains or stores: sums that SQLite makes, and those only when something has happened since
the last time (or a minute has passed). Counters are of this process, as Prometheus expects them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from hvsnap import __version__, wire
from hvsnap.alarm import Level
from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.figures import DiskFigures, Figures
from hvsnap.config import Settings
from hvsnap.drill import Outcome
from hvsnap.errors import HvsnapError
from hvsnap.happenings import EventType
from hvsnap.model import Event
from hvsnap.mqtt.publisher import MqttPublisher
from hvsnap.ports import Clock
from hvsnap.service.hooks import OPERATIONS, OTHER
from hvsnap.service.sampling import device_space
from hvsnap.service.service import Service

FIGURES_S = 60.0
"""Figures are read again after so long, also if nothing has happened: verifying a pack, say, is no event."""

UNDER_WAY_MAX = 4096
DURATIONS_S = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400)
DISK = ("guest", "target", "disk")
KINDS = ("capture", "rollback", "disk-create", "freeze")
"""Kinds of open operations that are always told, so that none of them is 0 and not unknown."""

ALARMS: dict[str | None, int] = {None: 0, Level.WARNING: 1, Level.SEVERE: 2}

Message = MutableMapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the present is looked up."""

    catalog: Catalog
    service: Service
    mqtt: MqttPublisher | None
    settings: Settings
    clock: Clock


@dataclass(frozen=True, slots=True)
class _Seen:
    """The present, as one reading shows it."""

    figures: Figures
    busy: int
    tasks: int
    mqtt: wire.MqttStatus | None
    free_bytes: int
    device_bytes: int


class Metrics:
    """An ASGI application, and a listener to events, which it counts."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series beside every counter, which nobody asked for
        self._counts = _Counts()
        self._present = _Present(sources)
        self._registry = CollectorRegistry()
        for collector in (self._counts, self._present):
            self._registry.register(collector)
        ProcessCollector(registry=self._registry)
        self._figures: Figures | None = None
        self._read_at = 0.0
        self._happened = False
        self._turn = asyncio.Lock()

    def event(self, event: Event) -> None:
        """Count a committed event; the figures are read anew."""
        self._happened = True
        self._counts.event(event)

    # -- HTTP -------------------------------------------------------------------------------------

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        status, kind, body = await self._answer(scope)
        headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, scope: Message) -> tuple[int, str, bytes]:
        plain = "text/plain; charset=utf-8"
        if scope["path"] != "/metrics":
            return 404, plain, b"the metrics are at /metrics\n"
        if scope["method"] not in ("GET", "HEAD"):
            return 405, plain, b"GET is all that there is\n"
        accept = ",".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"accept")
        encode, kind = choose_encoder(accept)
        try:
            async with self._turn:
                self._present.seen = await self._look()
                return 200, kind, encode(self._registry)
        except HvsnapError as error:
            return 503, plain, f"{error.message}\n".encode()

    async def _look(self) -> _Seen:
        sources = self._sources
        now = sources.clock.monotonic()
        figures = self._figures
        if figures is None or self._happened or now - self._read_at > FIGURES_S:
            self._happened = False  # before: what happens meanwhile has them read again the next time
            self._figures = figures = await sources.catalog.figures()
            self._read_at = now
        store = sources.settings.store.path
        free, size = (0, 0) if store is None else await asyncio.to_thread(device_space, store)
        busy, running = len(sources.service.captures.busy_disks()), sources.service.tasks.running
        mqtt = None if sources.mqtt is None else sources.mqtt.status()
        return _Seen(figures, busy, running, mqtt, free, size)


class _Counts(Collector):
    """What has happened since the daemon started."""

    def __init__(self) -> None:
        self._accomplished = _counter("hvsnap_snapshots_accomplished", "Snapshots accomplished", "kind")
        self._failures = _counter("hvsnap_snapshot_failures", "Snapshots failed")
        self._unusual = _counter("hvsnap_unusual_snapshots", "Alarms about what has changed, by level", "level")
        self._deleted = _counter("hvsnap_snapshots_deleted", "Snapshots deleted, by whom", "why")
        self._read = _counter("hvsnap_capture_read_bytes", "Bytes read from disks by accomplished snapshots")
        self._stored = _counter("hvsnap_capture_stored_bytes", "Bytes that the store grew by with them")
        self._rollbacks = _counter("hvsnap_rollbacks", "Rollbacks ended", "outcome")
        self._policy = _counter("hvsnap_policy_runs", "Runs of policies, per disk", "outcome")
        self._drills = _counter("hvsnap_drills", "Restore drills made, by outcome", "outcome")
        self._verification = _counter("hvsnap_verification_failures", "Verifications that found new damage")
        self._duration = Histogram(
            "hvsnap_capture_duration_seconds",
            "From the request of a snapshot, its waiting included, until it was accomplished",
            buckets=DURATIONS_S,
            registry=None,
        )
        for kind in ("full", "incremental"):
            self._accomplished.labels(kind)
        for level in Level:
            self._unusual.labels(level)
        for why in ("deleted", "expired", "evicted"):
            self._deleted.labels(why)
        for outcome in ("finished", "failed"):
            self._rollbacks.labels(outcome)
        for drilled in Outcome:
            self._drills.labels(drilled)
        for outcome in ("run", "missed", "failed"):
            self._policy.labels(outcome)
        self._began: OrderedDict[str, float] = OrderedDict()

    def event(self, event: Event) -> None:
        """Count one."""
        about = event.payload
        match event.type:
            case EventType.SNAPSHOT_CREATED:
                self._began[str(about.get("snapshot"))] = event.at
                if len(self._began) > UNDER_WAY_MAX:
                    self._began.popitem(last=False)
            case EventType.SNAPSHOT_ACCOMPLISHED:
                self._accomplished.labels(str(about.get("kind"))).inc()
                self._read.inc(_number(about.get("read_bytes")))
                self._stored.inc(_number(about.get("stored_bytes")))
                began = self._began.pop(str(about.get("snapshot")), None)
                if began is not None:
                    self._duration.observe(max(0.0, event.at - began))
            case EventType.SNAPSHOT_UNUSUAL:
                self._unusual.labels(str(about.get("level"))).inc()
            case EventType.SNAPSHOT_FAILED:
                self._failures.inc()
                self._began.pop(str(about.get("snapshot")), None)
            case EventType.SNAPSHOT_DELETED | EventType.SNAPSHOT_EXPIRED | EventType.SNAPSHOT_EVICTED:
                self._deleted.labels(event.type.rpartition(".")[2]).inc()
            case EventType.ROLLBACK_FINISHED | EventType.ROLLBACK_FAILED:
                self._rollbacks.labels(event.type.rpartition(".")[2]).inc()
            case EventType.POLICY_RUN | EventType.POLICY_MISSED | EventType.POLICY_FAILED:
                self._policy.labels(event.type.rpartition(".")[2]).inc()
            case EventType.DRILL_PASSED | EventType.DRILL_FAILED:
                self._drills.labels(str(about.get("outcome"))).inc()
            case EventType.VERIFICATION_FAILED:
                self._verification.inc()

    def collect(self) -> Iterator[Metric]:
        """Yield them."""
        counters = (self._accomplished, self._failures, self._unusual, self._deleted, self._read, self._stored)
        for one in (*counters, self._rollbacks, self._policy, self._drills, self._verification, self._duration):
            yield from one.collect()


class _Present(Collector):
    """What is, as :attr:`seen` has it."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._started_at = sources.clock.now()
        self.seen: _Seen | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield it; nothing before the first look, which is only when the registry asks for names."""
        seen = self.seen
        if seen is None:
            return
        build = GaugeMetricFamily("hvsnap_build_info", "The daemon's version and host id", labels=["version", "host"])
        build.add_metric([__version__, self._sources.settings.host_id], 1)
        yield build
        yield _gauge("hvsnap_start_time_seconds", "When the daemon started, since the epoch", self._started_at)
        yield from _disks(seen.figures.disks)
        yield _gauge(
            "hvsnap_snapshots_limit",
            "Snapshots that one chain may hold",
            self._sources.settings.limits.snapshots_per_disk,
        )
        every_s = self._sources.settings.drill.every_days * 86_400
        yield _gauge(
            "hvsnap_drill_interval_seconds", "How often each disk has a drill; 0: only when asked for", every_s
        )
        yield _gauge("hvsnap_captures_running", "Disks being captured, or being brought back afterwards", seen.busy)
        yield _gauge("hvsnap_tasks_running", "New disks, rollbacks, checks at work", seen.tasks)
        operations = GaugeMetricFamily("hvsnap_open_operations", "Entries of the journal", labels=["kind"])
        for kind in sorted({*KINDS, *seen.figures.operations}):
            operations.add_metric([kind], seen.figures.operations.get(kind, 0))
        yield operations
        yield from _store(seen)
        if seen.mqtt is not None:
            yield _gauge("hvsnap_mqtt_connected", "Whether the broker is connected", seen.mqtt.connected)
            yield _gauge("hvsnap_mqtt_pending_events", "Events that the broker has not got yet", seen.mqtt.pending)
        calls = CounterMetricFamily("hvsnap_hook_calls", "Calls of libvirt's hook", labels=["operation"])
        for operation in sorted(OPERATIONS | {OTHER}):
            calls.add_metric([operation], self._sources.service.hooks.calls[operation])
        yield calls
        refused = self._sources.service.hooks.refused
        yield CounterMetricFamily("hvsnap_hook_refusals", "Starts of guests that the hook refused", value=refused)


def _disks(disks: list[DiskFigures]) -> Iterator[Metric]:
    """Yield what is told of every disk; a name that a guest has taken over from another goes with its own disks."""
    told: tuple[tuple[str, str, Callable[[DiskFigures], float | None]], ...] = (
        ("hvsnap_snapshots", "Accomplished snapshots in the chain", lambda one: one.snapshots),
        (
            "hvsnap_last_snapshot_timestamp_seconds",
            "When the newest accomplished snapshot was taken, since the epoch; 0 without one",
            lambda one: one.last_at or 0,
        ),
        ("hvsnap_last_snapshot_failed", "Whether the newest snapshot that ended failed", lambda one: one.failed),
        (
            "hvsnap_disk_unusual",
            "Whether a snapshot of it is unusual, and nobody has acknowledged that: 1 by one sign, 2 by both",
            lambda one: ALARMS[one.alarm],
        ),
        (
            "hvsnap_last_drill_timestamp_seconds",
            "When its last restore drill that passed began, since the epoch; 0 without one",
            lambda one: one.drilled_at or 0,
        ),
        ("hvsnap_last_drill_failed", "Whether its newest restore drill did not pass", lambda one: one.drill_failed),
        ("hvsnap_disk_size_bytes", "Size of the disk", lambda one: one.size_bytes),
        ("hvsnap_disk_has_policy", "Whether a policy makes snapshots of it", lambda one: one.policy is not None),
    )
    for name, what, value in told:
        family = GaugeMetricFamily(name, what, labels=DISK)
        for one in disks:
            family.add_metric([one.guest, one.target, one.disk], float(value(one) or 0))
        yield family


def _store(seen: _Seen) -> Iterator[Metric]:
    store = seen.figures.store
    yield _gauge("hvsnap_store_stored_bytes", "Stored bytes of the blocks that are kept", store.live_bytes)
    yield _gauge("hvsnap_store_size_bytes", "Size of all packs", store.size_bytes)
    yield _gauge("hvsnap_store_blocks", "Blocks that are kept", store.live_blocks)
    yield _gauge("hvsnap_store_packs", "Packs", store.packs)
    yield _gauge("hvsnap_store_damaged_blocks", "Blocks that are known to be damaged", store.damaged_blocks)
    yield _gauge(
        "hvsnap_store_unverified_packs", "Packs never read again since they were written", store.unverified_packs
    )
    if store.verified_since is not None:
        what = "Since when every pack that was verified at all was verified, since the epoch"
        yield _gauge("hvsnap_store_verified_since_timestamp_seconds", what, store.verified_since)
    if seen.device_bytes:
        yield _gauge("hvsnap_store_device_bytes", "Size of the device that a local store is on", seen.device_bytes)
        yield _gauge("hvsnap_store_device_free_bytes", "What is free of it", seen.free_bytes)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, value=float(value))


def _counter(name: str, what: str, *labels: str) -> Counter:
    return Counter(name, what, labels, registry=None)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
