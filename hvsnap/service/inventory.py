"""Which guest, which disk: finding things by the words that people use, and knowing a disk again.

A disk is known again by its guest, its serial (its target, if it has none) and its image; a disk whose image was
replaced is another one, with a chain of its own (SERVICE 6.7), unless one image builds on the other
(:mod:`hvsnap.service.followed`). While a capture is open, the hypervisor shows its overlay as the disk's image; the
journal says what lies underneath, and :func:`resolve` looks through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvsnap.capture.facts import KIND, CaptureFacts
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import BadRequest, DiskUnknown, GuestUnknown, NoEligibleDisk
from hvsnap.happenings import EventType, disk_payload
from hvsnap.hypervisor import images
from hvsnap.model import Disk, DiskId, DiskView, GuestView, Layer, Operation, new_id
from hvsnap.ports import Census, Clock, Hypervisor
from hvsnap.service.followed import Followed

Overlays = Mapping[str, Layer]
"""Path of an open capture's overlay → the image underneath."""

_OVERLAY_NAME = re.compile(r"\.s-[a-z2-7]{12}\.overlay$")
"""How captures name their overlays (hvsnap.service.captures)."""

LOOKS_MAX = 3

NAMED_MAX = 5
"""How many of several matches an error names."""


def open_overlays(operations: Iterable[Operation]) -> dict[str, Layer]:
    """Return the overlays of the journal's open captures, and the image under each."""
    return {
        disk.overlay: Layer(disk.base, disk.base_format)
        for operation in operations
        if operation.kind == KIND
        for disk in CaptureFacts.of(operation).disks
        if disk.overlay
    }


def resolve(disk: DiskView, overlays: Overlays) -> DiskView:
    """Return a disk without the overlays of open captures: ``layers[0]`` is the image that stays.

    A capture that was opened over an overlay that a crash had left is looked through, too.
    """
    layers = disk.layers
    # Each turn goes down one overlay, so more turns than overlays would be a circle.
    for _ in range(len(overlays)):
        if not layers or layers[0].path not in overlays:
            break
        base = overlays[layers[0].path]
        below = [number for number, layer in enumerate(layers) if layer.path == base.path]
        # The definition of a guest that is off names only its topmost image.
        layers = layers[below[0] :] if below else (base,)
    return disk if layers is disk.layers else replace(disk, layers=layers)


def resolve_guest(guest: GuestView, overlays: Overlays) -> GuestView:
    """Return a guest with all its disks resolved."""
    return replace(guest, disks=tuple(resolve(disk, overlays) for disk in guest.disks))


def is_overlay(disk: DiskView) -> bool:
    """Whether a resolved disk's image is named like the overlay of a capture: one that the journal does not know."""
    return bool(disk.layers) and _OVERLAY_NAME.search(disk.top.path) is not None


def _skip_overlay(disk: DiskView) -> DiskView:
    """Never take an overlay for a disk of its own: a chain would begin with it, and end with the capture."""
    if not is_overlay(disk) or disk.skip_reason:
        return disk
    return replace(disk, skip_reason="its image is the overlay of a capture that the journal does not know")


def pick_guest(guests: Sequence[GuestView], name: str) -> GuestView:
    """Return the guest of that UUID or name; raises :class:`GuestUnknown`, :class:`BadRequest` if several match."""
    for guest in guests:
        if guest.uuid == name.lower():
            return guest
    found = [guest for guest in guests if guest.name == name]
    if not found:
        raise GuestUnknown(f"there is no guest {name[:64]}")
    if len(found) > 1:
        several = _enumerate(f"{guest.name} ({guest.uuid})" for guest in found)
        raise BadRequest(f"several guests are called {name[:64]}: {several}", hint="name it by its UUID")
    return found[0]


def pick_disk(disks: Sequence[Disk], name: str, *, guest: str = "") -> Disk:
    """Return the known disk of that id, target, ``GUEST/TARGET`` or path.

    ``guest`` (name or UUID) narrows the search. Of the disks that a target of a guest has had one after the other the
    newest is meant; the others go by their ids. Raises :class:`DiskUnknown`, :class:`BadRequest` if several match.
    """
    among = [disk for disk in disks if guest in ("", disk.guest_name, disk.guest_uuid)]
    for disk in among:
        if disk.id == name:
            return disk
    newest: dict[tuple[str, str], Disk] = {}
    for disk in sorted(among, key=lambda disk: (not disk.released, disk.created_at)):
        if name in (disk.target, disk.source, f"{disk.guest_name}/{disk.target}", f"{disk.guest_uuid}/{disk.target}"):
            newest[disk.guest_uuid, disk.target] = disk
    found = list(newest.values())
    if not found:
        at = f" of guest {guest[:64]}" if guest else ""
        raise DiskUnknown(f"no disk {name[:128]}{at} has a chain")
    if len(found) > 1:
        several = _enumerate(f"{disk.guest_name}/{disk.target} ({disk.id})" for disk in found)
        raise BadRequest(f"{name[:128]} means several disks: {several}", hint="name it GUEST/TARGET or by its id")
    return found[0]


def _enumerate(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = len(texts) - NAMED_MAX
    return ", ".join(texts[:NAMED_MAX]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, slots=True)
class Found:
    """A disk of a guest as it is attached now; ``known`` is its row in the catalog, if it has one."""

    guest: GuestView
    view: DiskView
    known: Disk | None


class Inventory:
    """Guests and disks, by any of their names, as the hypervisor shows them now."""

    def __init__(self, hypervisor: Hypervisor, catalog: Catalog, clock: Clock) -> None:
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._clock = clock
        self._followed = Followed(catalog)

    async def overlays(self) -> dict[str, Layer]:
        """Return the overlays of all open captures."""
        return open_overlays(await self._catalog.operations(KIND))

    async def guests(self) -> list[GuestView]:
        """Return all guests, their disks resolved."""
        return (await self.census()).guests

    async def census(self) -> Census:
        """Return all guests, their disks resolved, and why others cannot be seen; raises if none can be."""
        # The journal before and after: an overlay is written down before it is made, and crossed out after it is gone.
        # A capture that begins and ends in between shows an overlay that neither look knows: then look again.
        for _ in range(LOOKS_MAX):
            before = await self.overlays()
            census = await self._hypervisor.census()
            if census.silent and not census.guests:
                raise next(iter(census.silent.values()))
            guests = census.guests
            overlays = before | await self.overlays()
            resolved = [resolve_guest(guest, overlays) for guest in guests]
            if not any(is_overlay(disk) for guest in resolved for disk in guest.disks):
                break
        skipped = [replace(guest, disks=tuple(_skip_overlay(disk) for disk in guest.disks)) for guest in resolved]
        return Census(skipped, census.silent)

    async def guest(self, name: str) -> GuestView:
        """Return one guest by its name or UUID, its disks resolved.

        Where it is not among those that can be seen, the reason why others cannot be is the answer.
        """
        census = await self.census()
        try:
            return pick_guest(census.guests, name)
        except GuestUnknown:
            why = census.silent.get(name) or next(iter(census.silent.values()), None)
            raise why or GuestUnknown(f"there is no guest {name[:64]}") from None

    async def known(self, guest: GuestView, disk: DiskView) -> Disk | None:
        """Return the catalog's row of a (resolved) disk, if it has one; it follows the disk to another image."""
        if not disk.layers:
            return None
        row = await self._catalog.find_disk(guest.uuid, disk.serial, disk.target, disk.top.path)
        return row if row is not None or is_overlay(disk) else await self._followed.find(guest, disk)

    async def to_capture(self, guest_name: str, names: Sequence[str]) -> list[Found]:
        """Return the disks that a request names, each once, in the order of their targets in the guest.

        None named: all that can be captured. Raises :class:`GuestUnknown`, :class:`DiskUnknown`,
        :class:`NoEligibleDisk` for a disk that cannot be captured, with the reason.
        """
        guest = await self.guest(guest_name)
        found = [Found(guest, disk, await self.known(guest, disk)) for disk in guest.disks]
        if names:
            wanted = {id(self._named(found, name)) for name in names}
            found = [disk for disk in found if id(disk) in wanted]
        else:
            found = [disk for disk in found if not disk.view.skip_reason]
        for disk in found:
            if disk.view.skip_reason:
                why = f"disk {disk.view.target} of {guest.name} cannot be captured: {disk.view.skip_reason}"
                raise NoEligibleDisk(why)
        if not found:
            raise NoEligibleDisk(f"guest {guest.name} has no disk that can be captured")
        return found

    def _named(self, found: Sequence[Found], name: str) -> Found:
        """Return the disk of this guest that has that target, path or id."""
        for disk in found:
            paths = {layer.path for layer in disk.view.layers[:1]}
            full = f"{disk.guest.name}/{disk.view.target}"
            if name in {disk.view.target, full, *paths} or (disk.known is not None and disk.known.id == name):
                return disk
        guest = found[0].guest.name if found else "the guest"
        raise DiskUnknown(f"{guest} has no disk {name[:128]}")

    async def register(self, found: Found, size_bytes: int, *, encrypted: bool = False) -> Disk:
        """Return the catalog's row of a disk, making it at the first capture; keeps names and target up to date.

        A disk whose image is ``encrypted`` is marked as encrypted, for ever (SERVICE 8.1).
        """
        guest, view = found.guest, found.view
        known = await self.known(guest, view)
        now: dict[str, Any] = {
            "guest_name": guest.name,
            "target": view.target,
            "format": view.top.format,
            "system": view.system,
            **({"encrypted": True} if encrypted else {}),
        }
        async with self._catalog.write() as tx:
            if known is not None:
                changes = {name: value for name, value in now.items() if getattr(known, name) != value}
                if not changes:
                    return known
                await tx.update_disk(known.id, **changes)
                return replace(known, **changes)
            disk = Disk(
                id=DiskId(new_id("d")),
                guest_uuid=guest.uuid,
                guest_name=guest.name,
                target=view.target,
                serial=view.serial,
                source=view.top.path,
                format=view.top.format,
                size_bytes=size_bytes,
                system=view.system,
                created_at=self._clock.now(),
                encrypted=encrypted,
            )
            await tx.add_disk(disk)
            await tx.emit(EventType.DISK_ATTACHED, disk_payload(disk))
            return disk

    async def disk(self, name: str, *, guest: str = "") -> Disk:
        """Return a disk that has a chain; see :func:`pick_disk`. Released ones are found, too."""
        disks = await self._catalog.disks(include_released=True)
        base = (await self.overlays()).get(name)
        return pick_disk(disks, name if base is None else base.path, guest=guest)

    async def known_or_attached(self, name: str) -> Disk:
        """Return the row of an attached disk, made for one that had none, or of one that is gone from its guest.

        Raises :class:`DiskUnknown`, :class:`BadRequest`, :class:`NoEligibleDisk`.
        """
        try:
            found = await self.find_attached(name)
        except DiskUnknown:
            return await self.disk(name)
        if found.known is not None:
            return found.known
        info = await images.image_info(found.view.top.path, found.view.top.format)
        return await self.register(found, info.size_bytes, encrypted=info.encrypted)

    async def find_attached(self, name: str) -> Found:
        """Return an attached disk by its id, path, ``GUEST/TARGET``, or target where only one guest has such a one.

        Raises :class:`DiskUnknown`, :class:`BadRequest` if several match, :class:`NoEligibleDisk` with the reason.
        """
        found = []
        for guest in await self.guests():
            for view in guest.disks:
                known = await self.known(guest, view)
                paths = {layer.path for layer in view.layers[:1]}
                names = {view.target, f"{guest.name}/{view.target}", f"{guest.uuid}/{view.target}", *paths}
                if name in names or (known is not None and known.id == name):
                    found.append(Found(guest, view, known))
        if not found:
            raise DiskUnknown(f"no guest has a disk {name[:128]}")
        if len(found) > 1:
            several = _enumerate(f"{one.guest.name}/{one.view.target}" for one in found)
            raise BadRequest(f"{name[:128]} means several disks: {several}", hint="name it GUEST/TARGET")
        if found[0].view.skip_reason:
            why = f"disk {name[:128]} cannot be captured: {found[0].view.skip_reason}"
            raise NoEligibleDisk(why)
        return found[0]

    async def attached(self, disk: Disk) -> Found:
        """Return a known disk as it is attached to its guest now.

        Raises :class:`GuestUnknown`, and :class:`DiskUnknown` when the guest has another disk in its place
        (SERVICE 6.7) or none.
        """
        guest = await self.guest(disk.guest_uuid)
        for view in guest.disks:
            known = await self.known(guest, view)
            if known is not None and known.id == disk.id:
                return Found(guest, view, known)
        raise DiskUnknown(
            f"disk {disk.id} ({disk.source}) is no longer attached to {guest.name}",
            hint="its snapshots can still make new disks: `hvsnap disk-create SNAPSHOT TARGET`",
        )
