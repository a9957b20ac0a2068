"""What is known of many hosts from what they publish: values only, fed message by message, bounded in every part."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from urllib.parse import unquote

from pydantic import ValidationError

from hvsnap.happenings import EventType
from hvsnap.mqtt.messages import DiskState, Health, HostStatus, Presence, ProgressReport, PublishedEvent

Message = HostStatus | PublishedEvent | ProgressReport | DiskState

HOSTS_MAX = 1000
DISKS_MAX = 50_000
LIVE_MAX = 1000
TROUBLES_MAX = 100
IDS_MAX = 1000

LIVE_S = 30.0
"""Progress that nobody renews is over; it comes once a second."""

SILENT_S = 180.0
"""A host that says it is online, and has not for so long (it does every minute), is doubtful."""

TROUBLES = frozenset(
    one for one in EventType
    if one.endswith(("failed", "missed", "unusual"))
    or one in (EventType.STORE_INCOMPLETE, EventType.STORE_NEARLY_FULL)
)  # fmt: skip

_ENDS = {
    EventType.SNAPSHOT_ACCOMPLISHED,
    EventType.SNAPSHOT_FAILED,
    EventType.DISK_CREATED,
    EventType.DISK_CREATE_FAILED,
    EventType.ROLLBACK_FINISHED,
    EventType.ROLLBACK_FAILED,
}


@dataclass(slots=True)
class HostSeen:
    """One host. Times are of the one who watches, in seconds of a clock that nobody sets."""

    name: str
    status: HostStatus | None = None
    heard_s: float = 0.0
    troubles: int = 0
    free_bytes: int | None = None
    total_bytes: int | None = None
    ids: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def presence(self, now_s: float) -> str:
        """Return whether it is there, in a word."""
        if self.status is None:
            return "unknown"
        if self.status.state is Presence.OFFLINE:
            return f"offline ({self.status.reason or 'no reason'})"
        return "online" if now_s - self.heard_s < SILENT_S else "silent"


@dataclass(frozen=True, slots=True)
class Live:
    """Something that is under way."""

    report: ProgressReport
    heard_s: float


def read(prefix: str, topic: str, payload: bytes) -> Message | None:
    """Return what a message says; None for one that is none of ours, or of a form that is not known here."""
    parts = topic.removeprefix(f"{prefix}/").split("/")
    forms: dict[tuple[str, int], type[HostStatus | PublishedEvent | ProgressReport | DiskState]] = {
        ("status", 2): HostStatus,
        ("event", 2): PublishedEvent,
        ("progress", 4): ProgressReport,
        ("state", 6): DiskState,
    }
    form = forms.get((parts[-1], len(parts)))
    if form is None or not topic.startswith(f"{prefix}/"):
        return None
    try:
        return form.model_validate_json(payload)
    except ValidationError:
        return None


class Board:
    """Takes messages, and keeps what they come to."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.hosts: dict[str, HostSeen] = {}
        self.disks: OrderedDict[tuple[str, str], DiskState] = OrderedDict()
        self._live: OrderedDict[tuple[str, str], Live] = OrderedDict()
        self.troubles: deque[PublishedEvent] = deque(maxlen=TROUBLES_MAX)
        self.unreadable = 0

    def take(self, topic: str, payload: bytes, now_s: float) -> Message | None:
        """Take a message; return what it says, if that is new."""
        if not payload:
            self._clear(topic)
            return None
        message = read(self._prefix, topic, payload)
        if message is None:
            self.unreadable += 1
            return None
        host = self._host(message.host)
        if host is None:
            return None
        host.heard_s = now_s
        if isinstance(message, HostStatus):
            known = host.status is not None and host.status.state is message.state
            host.status = message
            return None if known else message
        if isinstance(message, PublishedEvent):
            return self._event(host, message)
        if isinstance(message, ProgressReport):
            self._live[message.host, message.id] = Live(message, now_s)
            self._live.move_to_end((message.host, message.id))
            while len(self._live) > LIVE_MAX:
                self._live.popitem(last=False)
            return message
        self.disks[message.host, message.disk] = message
        while len(self.disks) > DISKS_MAX:
            self.disks.popitem(last=False)
        return message

    def live(self, now_s: float) -> list[ProgressReport]:
        """Return what is under way, those that began first in front."""
        return [one.report for one in self._live.values() if now_s - one.heard_s < LIVE_S]

    def of_host(self, name: str) -> list[DiskState]:
        """Return the disks of a host."""
        return [one for (host, _disk), one in self.disks.items() if host == name]

    def attention(self) -> list[DiskState]:
        """Return all disks, those that ask for attention in front, then by what they hold."""
        order = {Health.UNUSUAL: 0, Health.FAILED: 1, Health.UNPROTECTED: 2, Health.OK: 3}
        return sorted(self.disks.values(), key=lambda one: (order[one.health], -(one.stored_bytes or 0)))

    def _host(self, name: str) -> HostSeen | None:
        if name not in self.hosts:
            if len(self.hosts) >= HOSTS_MAX:
                return None
            self.hosts[name] = HostSeen(name)
        return self.hosts[name]

    def _event(self, host: HostSeen, event: PublishedEvent) -> PublishedEvent | None:
        # What may come twice has the same id; sequences begin anew with a new catalog.
        if event.id in host.ids:
            return None
        host.ids[event.id] = None
        if len(host.ids) > IDS_MAX:
            host.ids.popitem(last=False)
        if event.type in TROUBLES:
            host.troubles += 1
            self.troubles.append(event)
        if event.type == EventType.STORE_NEARLY_FULL:
            free, total = event.payload.get("free_bytes"), event.payload.get("total_bytes")
            host.free_bytes = free if isinstance(free, int) else None
            host.total_bytes = total if isinstance(total, int) else None
        if event.type in _ENDS:
            self._live.pop((event.host, str(event.payload.get("snapshot"))), None)
        return event

    def _clear(self, topic: str) -> None:
        """Forget a disk whose retained state was cleared: it is released, or its guest has another name."""
        parts = topic.removeprefix(f"{self._prefix}/").split("/")
        if len(parts) == 6 and parts[-1] == "state":
            known = self.disks.get((unquote(parts[0]), unquote(parts[4])))
            if known is not None and known.guest == unquote(parts[2]):
                del self.disks[known.host, known.disk]
