"""An in-memory hypervisor and captures, for tests of rules that are not about QEMU."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import GuestUnknown, HvsnapError, HypervisorFailed, HypervisorUnreachable, Refused
from hvsnap.instant import Ready, Span, alone
from hvsnap.model import (
    Bitmap,
    Disk,
    DiskActivity,
    DiskId,
    DiskView,
    Event,
    GuestState,
    GuestUuid,
    GuestView,
    Layer,
    Progress,
    Snapshot,
    SnapshotId,
    State,
    Traits,
)
from hvsnap.ports import Census, JobView
from hvsnap.secret import Passphrase
from hvsnap.service.requests import SnapshotRequest
from tests.catalog_kit import StoppedClock

WEB = GuestUuid("0b5a1d7e-0000-4000-8000-000000000001")
MAIL = GuestUuid("0b5a1d7e-0000-4000-8000-000000000002")


def a_view(target: str = "vda", path: str = "/images/web.qcow2", **changes: Any) -> DiskView:
    view = DiskView(target, "virtio", "", (Layer(path, "qcow2"),), system=target == "vda")
    return replace(view, **changes)


def a_guest(*disks: DiskView, **changes: Any) -> GuestView:
    return replace(GuestView(WEB, "web01", GuestState.RUNNING, True, disks), **changes)


class FakeHypervisor:
    """Guests as the test puts them; remembers what was done to them."""

    def __init__(self, *guests: GuestView) -> None:
        self.shown = {guest.uuid: guest for guest in guests}
        self.bitmaps_of: dict[tuple[GuestUuid, str], list[Bitmap]] = {}
        self.log: list[str] = []
        self.secrets: dict[str, bytes | None] = {}
        self.unreachable = False
        self.silent: dict[str, HvsnapError] = {}
        self.ignores_shutdown = False
        self.before_looking: list[Callable[[], None]] = []

    def _look(self) -> None:
        if self.unreachable:
            raise HypervisorUnreachable("libvirt does not answer")
        for hook in self.before_looking:
            hook()

    async def guests(self) -> list[GuestView]:
        self._look()
        return sorted(self.shown.values(), key=lambda guest: guest.name)

    async def traits(self) -> Traits:
        return Traits({}, {})

    async def census(self) -> Census:
        return Census(await self.guests(), dict(self.silent))

    async def guest(self, uuid: GuestUuid) -> GuestView:
        self._look()
        if uuid not in self.shown:
            raise GuestUnknown(f"there is no guest {uuid}")
        return self.shown[uuid]

    async def definition(self, uuid: GuestUuid) -> str:
        return f"<domain><uuid>{uuid}</uuid></domain>"

    async def versions(self) -> dict[str, str]:
        self._look()
        return {"libvirt": "9.0.0", "qemu": "7.2.22"}

    async def bitmaps(self, uuid: GuestUuid, target: str) -> list[Bitmap]:
        return self.bitmaps_of.get((uuid, target), [])

    async def activity(self, uuid: GuestUuid, targets: Sequence[str]) -> dict[str, DiskActivity]:
        return {target: DiskActivity() for target in targets}

    async def bitmap_add(self, uuid: GuestUuid, names: Mapping[str, str], granularity: int) -> None:
        raise NotImplementedError

    async def bitmap_remove(self, uuid: GuestUuid, target: str, name: str) -> None:
        raise NotImplementedError

    async def switch_to_overlays(self, uuid: GuestUuid, overlays: dict[str, str], ready: Ready = alone) -> Span:
        raise NotImplementedError

    async def commit_start(self, uuid: GuestUuid, target: str, base: str) -> None:
        raise NotImplementedError

    async def commit_pivot(self, uuid: GuestUuid, target: str) -> None:
        raise NotImplementedError

    async def pull_start(self, uuid: GuestUuid, target: str) -> None:
        raise NotImplementedError

    async def pull_stop(self, uuid: GuestUuid, target: str) -> None:
        raise NotImplementedError

    async def job(self, uuid: GuestUuid, target: str) -> JobView | None:
        return None

    async def freeze(self, uuid: GuestUuid, timeout_s: float) -> int:
        raise NotImplementedError

    async def thaw(self, uuid: GuestUuid, timeout_s: float) -> None:
        raise NotImplementedError

    async def redefine_source(self, uuid: GuestUuid, target: str, layer_path: str, layer_format: str) -> None:
        raise NotImplementedError

    async def passphrase(self, secret: str) -> Passphrase | None:
        if secret not in self.secrets:
            return None
        if (value := self.secrets[secret]) is None:
            raise Refused(f"the secret {secret} is not given out")
        return Passphrase(value)

    async def resume_after_error(self, uuid: GuestUuid) -> None:
        raise NotImplementedError

    async def start(self, uuid: GuestUuid) -> None:
        self.log.append(f"start {self.shown[uuid].name}")
        self.shown[uuid] = replace(self.shown[uuid], state=GuestState.RUNNING)

    async def shutdown(self, uuid: GuestUuid, timeout_s: float) -> None:
        self.log.append(f"shutdown {self.shown[uuid].name}")
        if self.ignores_shutdown:
            raise HypervisorFailed(f"the guest did not shut down within {timeout_s:.0f} s")
        self.shown[uuid] = replace(self.shown[uuid], state=GuestState.OFF)


class FakeCaptures:
    """Captures that the test puts; :attr:`create_with` answers a create."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.requests: list[SnapshotRequest] = []
        self.cancelled: list[SnapshotId] = []
        self.busy: set[DiskId] = set()
        self.progresses: dict[SnapshotId, Progress] = {}
        self.create_with: Callable[[SnapshotRequest], Any] | None = None

    async def create(self, request: SnapshotRequest) -> list[Snapshot]:
        self.requests.append(request)
        if self.create_with is None:
            return []
        return await self.create_with(request)  # type: ignore[no-any-return]

    async def wait(self, ids: Sequence[SnapshotId]) -> list[Snapshot]:
        return [await self.catalog.snapshot(name) for name in ids]

    async def cancel(self, snapshot_id: SnapshotId) -> None:
        self.cancelled.append(snapshot_id)
        async with self.catalog.write() as tx:
            await tx.update_snapshot(snapshot_id, state=State.FAILED, error="it was cancelled")

    async def settled(self, disks: Sequence[DiskId]) -> None:
        return

    def busy_disks(self) -> set[DiskId]:
        return self.busy

    def progress(self, snapshot_id: SnapshotId) -> Progress | None:
        return self.progresses.get(snapshot_id)


class Heard:
    """A publisher that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.progresses: list[Progress] = []

    def event(self, event: Event) -> None:
        self.events.append(event)

    def progress(self, progress: Progress) -> None:
        self.progresses.append(progress)


@contextlib.asynccontextmanager
async def a_catalog(directory: Any, clock: StoppedClock | None = None) -> AsyncIterator[Catalog]:
    catalog = await Catalog.open(directory, clock or StoppedClock())
    try:
        yield catalog
    finally:
        await catalog.close()


def known(view: DiskView, guest: GuestView, **changes: Any) -> dict[str, Any]:
    """Return the fields that make a catalog row out of a disk as it is shown."""
    return {
        "guest_uuid": guest.uuid,
        "guest_name": guest.name,
        "target": view.target,
        "serial": view.serial,
        "source": view.top.path,
    } | changes


__all__ = ["Disk", "FakeCaptures", "FakeHypervisor", "Heard", "a_catalog", "a_guest", "a_view", "known"]


class DoneCaptures:
    """Captures that are over when their request is answered: nothing is ever under way."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    async def wait(self, ids: Sequence[SnapshotId]) -> list[Snapshot]:
        return [await self.catalog.snapshot(one) for one in ids]

    async def cancel(self, snapshot_id: SnapshotId) -> None: ...

    async def settled(self, disks: Sequence[DiskId]) -> None: ...

    def busy_disks(self) -> set[DiskId]:
        return set()

    def progress(self, snapshot_id: SnapshotId) -> None:
        return None
