"""`doctor`: looks at the host and says what to do about what it finds.

Looking is here, judging in :mod:`hvsnap.service.findings`. Nothing is changed, and nothing that cannot be seen is an
error of the doctor: it becomes a finding.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hvsnap.capture.facts import KIND, CaptureFacts
from hvsnap.catalog.catalog import Catalog
from hvsnap.config import Settings
from hvsnap.errors import HvsnapError
from hvsnap.hook_place import DIRECTORY, HookPlace
from hvsnap.model import DiskId, Operation, Traits
from hvsnap.ports import Census
from hvsnap.service import doctor_looks, findings, findings_disks, findings_host, findings_snapshots
from hvsnap.service.doctor_guests import DiskLooks, GuestHost
from hvsnap.service.guests import Guests
from hvsnap.service.inventory import Inventory
from hvsnap.wire import DoctorReport, Finding, MqttStatus, Severity

IMAGE_DIRECTORIES_MAX = 32

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


@dataclass(frozen=True, slots=True)
class Premises:
    """What the configuration says of the host; without ``settings`` nothing is said of these themselves."""

    places: Sequence[Place]
    libvirt_uri: str
    overlay_dir: str = ""
    settings: Settings | None = None
    hooks: str = DIRECTORY


def premises(settings: Settings) -> Premises:
    """Return what a configuration says."""
    return Premises(places(settings), settings.hypervisor.libvirt_uri, settings.capture.overlay_dir, settings)


class Versions(Protocol):
    """The hypervisor's side of the doctor that needs no guest."""

    async def versions(self) -> dict[str, str]:
        """Return dotted versions under ``libvirt`` and ``qemu``; raises :class:`HypervisorUnreachable`."""
        ...

    async def traits(self) -> Traits:
        """Return what the hypervisor's host is like; raises :class:`HypervisorUnreachable`."""
        ...


class Examined(Versions, GuestHost, Protocol):
    """The hypervisor's side of the doctor."""

    async def census(self) -> Census:
        """Return all guests, and what kept others from being seen."""
        ...


def report(found: Sequence[Finding]) -> DoctorReport:
    """Return findings as a report."""
    return DoctorReport(worst=max((one.severity for one in found), key=_SEVERITIES.index), findings=list(found))


async def host_findings(premises: Premises) -> list[Finding]:
    """Look at the host alone: tools, libraries, KVM, directories, hook. Needs neither a catalog nor a hypervisor."""
    answers = [(name, package, await doctor_looks.answer(name, "--version")) for name, package in _TOOLS]
    found = [findings.tool(name, name, answer, package) for name, package, answer in answers]
    found += await asyncio.to_thread(_libnbd)
    found.append(findings_host.nbdkit(installed=shutil.which("nbdkit") is not None))
    found.append(findings_host.libguestfs(installed=importlib.util.find_spec("guestfs") is not None))
    found.append(await asyncio.to_thread(_kvm))
    found.append(findings_host.clock(await asyncio.to_thread(doctor_looks.clock_is_synchronised)))
    for place in premises.places:
        seen = await asyncio.to_thread(look_at_directory, place.path)
        found += findings.directory(place.check, place.purpose, seen, private=place.private)
    if premises.settings is not None:
        kinds = {place.path: await asyncio.to_thread(doctor_looks.file_system, place.path) for place in premises.places}
        found += findings_host.configuration(premises.settings, kinds)
        if premises.libvirt_uri:
            found += await asyncio.to_thread(_hook, premises.hooks, premises.settings)
    return found


def _hook(directory: str, settings: Settings) -> list[Finding]:
    try:
        return findings_host.hook(HookPlace(directory, settings).report())
    except HvsnapError as error:
        what = "libvirt's hook cannot be looked at"
        return [
            Finding(severity=Severity.WARNING, check="hook", what=what, evidence=error.message, remedy=error.hint)
        ]  # fmt: skip


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


def _libnbd() -> list[Finding]:
    answer = None
    with contextlib.suppress(ImportError):
        import nbd  # noqa: PLC0415 - the distribution's binding may be absent, and the doctor is who says so

        answer = f"libnbd {nbd.NBD().get_version()}"
    there = findings.tool("libnbd", "libnbd's Python binding", answer, "python3-libnbd")
    return findings_host.libnbd(findings.parse_version(answer or "")) or [there]


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
        premises: Premises,
        hypervisor: Examined,
        catalog: Catalog,
        inventory: Inventory,
        guests: Guests,
        looks: DiskLooks,
        busy_disks: Callable[[], set[DiskId]],
        held: Callable[[], set[str]],
        mqtt_status: Callable[[], MqttStatus],
        days_to_full: Callable[[], Awaitable[float | None]],
    ) -> None:
        self._premises = premises
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._inventory = inventory
        self._guests = guests
        self._looks = looks
        self._busy_disks = busy_disks
        self._held = held
        self._mqtt_status = mqtt_status
        self._days_to_full = days_to_full

    async def examine(self) -> DoctorReport:
        """Look at everything, in a fixed order."""
        found = await host_findings(self._premises)
        found += await self._hypervisor_findings()
        found += await self._catalog_findings()
        found.append(findings.mqtt(self._mqtt_status()))
        return report(found)

    async def _hypervisor_findings(self) -> list[Finding]:
        found, _answered = await version_findings(self._hypervisor, self._premises.libvirt_uri)
        with contextlib.suppress(HvsnapError):
            census = await self._hypervisor.census()
            traits = await self._hypervisor.traits()
            listing = await self._guests.listing()
            found += findings.silent_guests(census.silent)
            found += findings.transient(census.guests)
            found += findings.disks(listing)
            found += findings_disks.left_out(listing)
            disks = await self._looks.disks(census.guests, self._busy_disks())
            found += findings_disks.settings(disks) + findings_disks.bitmaps(disks)
            found += await self._looks.unfleeceable(census.guests)
            named = {guest.uuid: guest.name for guest in census.guests}
            found += findings_disks.checkpoints({named.get(uuid, uuid): c for uuid, c in traits.checkpoints.items()})
            found += await self._overlay_findings(disks, traits)
        return found

    async def _overlay_findings(self, disks: Sequence[findings_disks.DiskSeen], traits: Traits) -> list[Finding]:
        """Look at where overlays will be: who gets there, and how much space there is."""
        overlay_dir = self._premises.overlay_dir
        devices = {disk.path for disk in disks if await asyncio.to_thread(_is_device, disk.path)}
        beside = sorted({os.path.dirname(disk.path) for disk in disks if disk.path not in devices})
        found = findings_disks.devices(disks, devices, overlay_dir)
        directories = [overlay_dir] if overlay_dir else beside[:IMAGE_DIRECTORIES_MAX]
        if not overlay_dir:
            seen = [await asyncio.to_thread(look_at_directory, one) for one in directories]
            found += findings_disks.overlay_space([one for one in seen if not one.problem])
        rules = await asyncio.to_thread(doctor_looks.helper_rules)
        found += findings_host.confinement(traits.labels, directories, rules)
        tried = await doctor_looks.passes(traits.labels.get("dac", ""), overlay_dir) if overlay_dir else None
        if tried is not None:
            found.append(findings_host.access(overlay_dir, tried[0], passes=tried[1]))
        return found

    async def _catalog_findings(self) -> list[Finding]:
        try:
            disks = await self._catalog.disks(include_released=True)
            snapshots = await self._catalog.snapshots()
            # First who is at work, then the journal: work that ends in between must not be taken for a crash's.
            held = self._held()
            operations = await self._catalog.operations()
            held |= self._held()
            drills = await self._catalog.drills.newest()
        except HvsnapError as error:
            return [
                Finding(
                    severity=Severity.ERROR, check="catalog", what="the catalog cannot be read", evidence=error.message,
                    remedy=error.hint,
                )
            ]  # fmt: skip
        evidence = f"{len(disks)} disks, {len(snapshots)} snapshots"
        ok = Finding(severity=Severity.OK, check="catalog", what="the catalog answers", evidence=evidence, remedy="")
        busy = self._busy_disks() | held
        left = [one for one in operations if not _is_worked_on(one, busy)]
        open_now = findings.operations(left, len(operations))
        newest_s = max((row.created_at for row in snapshots), default=0.0)
        filling = findings.filling(await self._days_to_full())
        present = {disk.id: disk for disk in disks if not disk.released}
        unusual = findings_snapshots.unusual(present, snapshots) + findings_snapshots.drills(present, drills)
        return [ok, *filling, open_now, *unusual, *findings_host.clock_before(newest_s, time.time())]


async def _answer_of_qemu() -> str:
    return await doctor_looks.answer(f"qemu-system-{os.uname().machine}", "--version") or ""


def _is_worked_on(operation: Operation, busy: set[str]) -> bool:
    """Whether this process is at work on a journal entry: on the entry by its id, on its disk, or on its path."""
    if operation.kind == KIND:
        return any(disk.disk in busy for disk in CaptureFacts.of(operation).disks)
    return not busy.isdisjoint({operation.id, operation.facts.get("disk"), operation.facts.get("target")})


def _is_device(path: str) -> bool:
    return Path(path).is_block_device()
