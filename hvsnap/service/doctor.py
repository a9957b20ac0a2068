"""`doctor`: looks at the host and says what to do about what it finds.

Looking is here, judging in :mod:`hvsnap.service.findings`. Nothing is changed, and nothing that cannot be seen is an
error of the doctor: it becomes a finding.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hvsnap.capture.facts import KIND, CaptureFacts
from hvsnap.catalog.catalog import Catalog
from hvsnap.config import Settings
from hvsnap.errors import HvsnapError
from hvsnap.hypervisor.tools import run
from hvsnap.model import DiskId, Operation
from hvsnap.ports import Census
from hvsnap.service import findings
from hvsnap.service.guests import Guests
from hvsnap.service.inventory import Inventory
from hvsnap.wire import DoctorReport, Finding, MqttStatus, Severity

TOOL_TIMEOUT_S = 10.0

_TOOLS = (
    ("qemu-img", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("ionice", "util-linux"),
    ("setpriv", "util-linux"),
)
_SEVERITIES = (Severity.OK, Severity.INFO, Severity.WARNING, Severity.ERROR)


@dataclass(frozen=True, slots=True)
class Place:
    """A directory that hvsnap uses. ``private``: nobody else may even look into it."""

    check: str
    purpose: str
    path: str
    private: bool


def places(settings: Settings) -> list[Place]:
    """Return the directories that hvsnap uses, as the configuration names them."""
    found = [Place("state-dir", "state directory", settings.state_dir, private=True)]
    if settings.store.path is not None:
        found.append(Place("store", "store", str(settings.store.path), private=True))
    if settings.capture.overlay_dir:
        found.append(Place("overlay-dir", "directory of overlays", settings.capture.overlay_dir, private=False))
    return found


class Versions(Protocol):
    """The hypervisor's side of the doctor."""

    async def versions(self) -> dict[str, str]:
        """Return dotted versions under ``libvirt`` and ``qemu``; raises :class:`HypervisorUnreachable`."""
        ...

    async def census(self) -> Census:
        """Return all guests, and what kept others from being seen."""
        ...


def report(found: Sequence[Finding]) -> DoctorReport:
    """Return findings as a report."""
    return DoctorReport(worst=max((one.severity for one in found), key=_SEVERITIES.index), findings=list(found))


async def host_findings(places: Sequence[Place]) -> list[Finding]:
    """Look at the host alone: tools, libraries, KVM, directories. Needs neither a catalog nor a hypervisor."""
    found = [findings.tool(name, name, await _answer(name, "--version"), package) for name, package in _TOOLS]
    found.append(await asyncio.to_thread(_libnbd))
    found.append(await asyncio.to_thread(_kvm))
    for place in places:
        seen = await asyncio.to_thread(look_at_directory, place.path)
        found += findings.directory(place.check, place.purpose, seen, private=place.private)
    return found


async def version_findings(hypervisor: Versions, uri: str) -> tuple[list[Finding], bool]:
    """Look at the hypervisor's versions; also returns whether it answered."""
    versions: dict[str, str] = {}
    problem = ""
    try:
        versions = await hypervisor.versions()
    except HvsnapError as error:
        problem = error.message
    found = findings.qemu(findings.parse_version(versions.get("qemu", "") or await _answer_of_qemu()))
    found.append(findings.libvirt(findings.parse_version(versions.get("libvirt", "")), problem, uri))
    return found, not problem


async def _answer(*argv: str) -> str | None:
    """Return what a tool prints; None if it is missing or does not answer."""
    with contextlib.suppress(HvsnapError, TimeoutError, OSError):
        return (await asyncio.wait_for(run(*argv), TOOL_TIMEOUT_S)).decode(errors="replace")
    return None


def _libnbd() -> Finding:
    try:
        import nbd  # noqa: PLC0415 - the distribution's binding may be absent, and the doctor is who says so

        return findings.tool("libnbd", "libnbd's Python binding", f"libnbd {nbd.NBD().get_version()}", "python3-libnbd")
    except ImportError:
        return findings.tool("libnbd", "libnbd's Python binding", None, "python3-libnbd")


def _kvm() -> Finding:
    flags: set[str] = set()
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("flags"):
                flags.update(line.partition(":")[2].split())
                break
    return findings.kvm(device=os.path.exists("/dev/kvm"), cpu_flags=frozenset(flags))


def look_at_directory(path: str) -> findings.DirectorySeen:
    """Look at a directory and the file system it lies on. Blocking."""
    try:
        seen = os.stat(path)
        space = os.statvfs(path)
    except OSError as error:
        return findings.DirectorySeen(path, problem=error.strerror or str(error))
    if not os.path.isdir(path):
        return findings.DirectorySeen(path, problem="it is not a directory")
    return findings.DirectorySeen(
        path,
        mode=seen.st_mode,
        writable=os.access(path, os.W_OK | os.X_OK),
        free_bytes=space.f_bavail * space.f_frsize,
        total_bytes=space.f_blocks * space.f_frsize,
    )


class Doctor:
    """The whole examination, from inside the daemon."""

    def __init__(
        self,
        places: Sequence[Place],
        libvirt_uri: str,
        hypervisor: Versions,
        catalog: Catalog,
        inventory: Inventory,
        guests: Guests,
        busy_disks: Callable[[], set[DiskId]],
        mqtt_status: Callable[[], MqttStatus],
    ) -> None:
        self._places = places
        self._uri = libvirt_uri
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._inventory = inventory
        self._guests = guests
        self._busy_disks = busy_disks
        self._mqtt_status = mqtt_status

    async def examine(self) -> DoctorReport:
        """Look at everything, in a fixed order."""
        found = await host_findings(self._places)
        found += await self._hypervisor_findings()
        found += await self._catalog_findings()
        found.append(findings.mqtt(self._mqtt_status()))
        return report(found)

    async def _hypervisor_findings(self) -> list[Finding]:
        found, _answered = await version_findings(self._hypervisor, self._uri)
        with contextlib.suppress(HvsnapError):
            census = await self._hypervisor.census()
            found += findings.silent_guests(census.silent)
            found += findings.transient(census.guests)
            found += findings.disks(await self._guests.listing())
        return found

    async def _catalog_findings(self) -> list[Finding]:
        try:
            disks = await self._catalog.disks(include_released=True)
            snapshots = await self._catalog.snapshots()
            operations = await self._catalog.operations()
        except HvsnapError as error:
            return [
                Finding(
                    severity=Severity.ERROR, check="catalog", what="the catalog cannot be read", evidence=error.message,
                    remedy=error.hint,
                )
            ]  # fmt: skip
        evidence = f"{len(disks)} disks, {len(snapshots)} snapshots"
        ok = Finding(severity=Severity.OK, check="catalog", what="the catalog answers", evidence=evidence, remedy="")
        busy = self._busy_disks()
        return [ok, findings.operations(operations, sum(1 for one in operations if _is_worked_on(one, busy)))]


async def _answer_of_qemu() -> str:
    return await _answer(f"qemu-system-{os.uname().machine}", "--version") or ""


def _is_worked_on(operation: Operation, busy: set[DiskId]) -> bool:
    """Whether this process is at work on a journal entry."""
    if operation.kind == KIND:
        return any(disk.disk in busy for disk in CaptureFacts.of(operation).disks)
    return operation.facts.get("disk") in busy
