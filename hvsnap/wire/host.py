"""The daemon and its host: findings, recovery, hooks, events."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import AwareDatetime, Field

from hvsnap.wire.base import Answer, Request


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Finding(Answer):
    """One thing that the doctor looked at."""

    severity: Severity
    check: str = Field(description="stable name of the check", examples=["kvm"])
    what: str
    evidence: str = Field(description="what was seen")
    remedy: str = Field(description="what to do about it; empty if nothing")


class DoctorReport(Answer):
    """All findings, in a fixed order; ``worst`` is the worst severity among them."""

    worst: Severity
    findings: list[Finding]


class RecoveredOperation(Answer):
    """One open operation of the journal, and what became of it."""

    id: str
    kind: str
    guest: str
    step: str = Field(description="where the crash had left it")
    outcome: Literal["finished", "undone", "waiting", "still-open"] = Field(
        description="waiting: for the daemon, which goes on with it by itself"
    )
    detail: str


class Recovery(Answer):
    """What a recovery found and did. Empty: nothing was open."""

    operations: list[RecoveredOperation]


class HookReport(Answer):
    """libvirt's hook as it is installed."""

    installed: bool
    script: str
    state_dir: str
    socket: str
    others: list[str] = Field(description="hooks of others for guests, which libvirt runs, too")
    restart_libvirtd: bool = Field(description="it was started when there was no hook for guests, and so runs none")
    barred: list[str] = Field(description="UUIDs of guests that may not start, or only from their overlay")
    problems: list[str]


class InstalledFile(Answer):
    """One file of the service. ``keep``: it is there already, and as it should be, or its owner's."""

    path: str
    action: Literal["create", "update", "keep"]


class Installed(Answer):
    """What was put in place, or with ``dry_run`` would be."""

    dry_run: bool
    files: list[InstalledFile]
    next: list[str] = Field(description="commands that are left to be run")


class MqttStatus(Answer):
    """The publisher of events."""

    configured: bool
    connected: bool
    pending: int = Field(description="events that the broker has not acknowledged yet")
    error: str = Field(description="why it is not connected; empty if it is, or has not been tried")


class Status(Answer):
    """The daemon at a glance."""

    version: str
    host_id: str
    started_at: AwareDatetime
    uptime_s: float
    stopping: bool
    guests: int | None = Field(description="null: the hypervisor does not answer")
    disks: int = Field(description="disks that have a chain")
    snapshots: int = Field(description="accomplished ones")
    captures: int = Field(description="disks being captured")
    tasks: int = Field(description="running ones")
    open_operations: int = Field(description="entries of the journal")
    stored_bytes: int = Field(default=0, description="what the store keeps")
    days_to_full: float | None = Field(
        default=None, description="of the store's device, at the pace of the last week; null: it is not to be told"
    )
    mqtt: MqttStatus


class HookCall(Request):
    """What libvirt's hook was called with. ``id`` is one for each call, on whichever way it comes."""

    id: str = Field(min_length=1, max_length=64)
    at: float = Field(ge=0, le=1e12, description="seconds since the epoch, UTC")
    guest: str = Field(max_length=1024)
    operation: str = Field(max_length=1024, examples=["prepare", "started", "stopped"])
    suboperation: str = Field(default="", max_length=1024)
    extra: str = Field(default="", max_length=1024)
    refused: bool = Field(default=False, description="the guest was kept from starting")
    xml: str = Field(default="", description="the guest's definition")
    truncated: bool = Field(default=False, description="the definition was too large, and is cut off")


class HookTaken(Answer):
    """The call was taken."""

    known: bool = Field(description="it had come before")


class Event(Answer):
    """One thing that happened (SERVICE 10). ``id`` is unique for ever; ``sequence`` orders a host's events."""

    sequence: int
    id: str
    type: str = Field(examples=["snapshot.accomplished"])
    at: AwareDatetime
    payload: dict[str, object]


class Progress(Answer):
    """How far a snapshot or task is."""

    id: str = Field(description="of the snapshot or task")
    progress: int = Field(ge=0, le=100, description="percent")
    done_bytes: int
    total_bytes: int
    rate_bytes_s: float
    eta_s: float | None
