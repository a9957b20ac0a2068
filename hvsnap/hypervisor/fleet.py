"""All hypervisors as one: libvirt's guests and bare ones, each call routed to whoever has the guest.

One that does not answer hides nobody else's guests; what is missing is told by :meth:`Fleet.census`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hvsnap.errors import GuestUnknown, HvsnapError, HypervisorFailed, HypervisorUnreachable
from hvsnap.instant import Ready, Span, alone
from hvsnap.model import Bitmap, DiskActivity, GuestUuid, GuestView, Traits
from hvsnap.ports import Census, Fleecer, Hypervisor, JobView
from hvsnap.secret import Passphrase

LOOK_S = 15.0
"""How long one hypervisor may take to show its guests before the others' are shown without them."""


class Owner(Hypervisor, Protocol):
    """A hypervisor with what its owner needs of it."""

    async def versions(self) -> dict[str, str]:
        """Return dotted versions, by ``libvirt`` and ``qemu``."""
        ...

    async def pull_start(self, uuid: GuestUuid, target: str) -> None:
        """Let QEMU copy what lies below a disk's image into it."""
        ...

    async def pull_stop(self, uuid: GuestUuid, target: str) -> None:
        """Give that up; what was copied stays."""
        ...

    async def traits(self) -> Traits:
        """Return what its host is like."""
        ...

    async def run(self) -> None:
        """Keep its connection up, until cancelled."""
        ...

    async def close(self) -> None:
        """Close its connection."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """One hypervisor, by the name that complaints about it carry."""

    name: str
    hypervisor: Owner


class Fleet:
    """Implements :class:`hvsnap.ports.Hypervisor` for the guests of all members."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self._owners: dict[GuestUuid, Owner] = {}

    async def run(self) -> None:
        """Keep all connections up, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for member in self.members:
                group.create_task(member.hypervisor.run(), name=f"hypervisor-{member.name}")
            await asyncio.Event().wait()  # with no member at all it has nothing to do, and goes on

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(member.hypervisor.close() for member in self.members))

    async def versions(self) -> dict[str, str]:
        """Return the versions of those that answer; raises when libvirt is a member and does not."""
        found: dict[str, str] = {}
        for member in self.members:
            try:
                found = await member.hypervisor.versions() | found
            except HvsnapError:
                if member.name == "libvirt":
                    raise
        return found

    async def traits(self) -> Traits:
        """Return what the hypervisors that answer tell of the host."""
        labels: dict[str, str] = {}
        checkpoints: dict[GuestUuid, Sequence[str]] = {}
        for member in self.members:
            with contextlib.suppress(HvsnapError):
                one = await member.hypervisor.traits()
                labels |= one.labels
                checkpoints |= one.checkpoints
        return Traits(labels, checkpoints)

    # -- who has which guest ----------------------------------------------------------------------

    async def census(self) -> Census:
        """Return all guests that can be seen, by name, and why others cannot."""
        looks = await asyncio.gather(*(self._look(member.hypervisor) for member in self.members))
        guests: list[GuestView] = []
        silent: dict[str, HvsnapError] = {}
        for member, look in zip(self.members, looks, strict=True):
            if isinstance(look, HvsnapError):
                silent[member.name] = look
                continue
            # A guest of libvirt may be configured as a bare one, too: it is libvirt's.
            guests += [guest for guest in look.guests if guest.uuid not in {one.uuid for one in guests}]
            silent |= look.silent
            self._owners = {guest.uuid: member.hypervisor for guest in look.guests} | self._owners
        return Census(sorted(guests, key=lambda guest: guest.name), silent)

    @staticmethod
    async def _look(hypervisor: Owner) -> Census | HvsnapError:
        try:
            return await asyncio.wait_for(hypervisor.census(), LOOK_S)
        except HvsnapError as error:
            return error
        except TimeoutError:
            return HypervisorUnreachable(f"no answer within {LOOK_S:.0f} s")

    async def guests(self) -> list[GuestView]:
        """Return all guests that can be seen; raises only when nobody answers."""
        census = await self.census()
        if self.members and len(census.silent) >= len(self.members):
            raise next(iter(census.silent.values()))
        return census.guests

    async def guest(self, uuid: GuestUuid) -> GuestView:
        """Return one guest. Raises :class:`GuestUnknown` only when everybody has said so."""
        try:
            return await (await self._owner(uuid)).guest(uuid)
        except GuestUnknown:
            # It may have moved from one to another.
            if self._owners.pop(uuid, None) is None:
                raise
            return await (await self._owner(uuid)).guest(uuid)

    async def _owner(self, uuid: GuestUuid) -> Owner:
        known = self._owners.get(uuid)
        if known is not None:
            return known
        silent: HvsnapError | None = None
        for member in self.members:
            try:
                await member.hypervisor.guest(uuid)
            except GuestUnknown:
                continue
            except HvsnapError as error:
                silent = silent or error
                continue
            self._owners[uuid] = member.hypervisor
            return member.hypervisor
        raise silent or GuestUnknown(f"there is no guest {uuid}")

    # -- passed on --------------------------------------------------------------------------------

    async def bitmaps(self, uuid: GuestUuid, target: str) -> list[Bitmap]:
        """Return the bitmaps of the running guest's active image."""
        return await (await self._owner(uuid)).bitmaps(uuid, target)

    async def activity(self, uuid: GuestUuid, targets: Sequence[str]) -> dict[str, DiskActivity]:
        """Return what the running guest has asked of these disks so far."""
        return await (await self._owner(uuid)).activity(uuid, targets)

    async def definition(self, uuid: GuestUuid) -> str:
        """Return what the guest would be started from next."""
        return await (await self._owner(uuid)).definition(uuid)

    async def bitmap_add(self, uuid: GuestUuid, names: Mapping[str, str], granularity: int) -> None:
        """Add a bitmap to every target's active image, or to none."""
        await (await self._owner(uuid)).bitmap_add(uuid, names, granularity)

    async def bitmap_remove(self, uuid: GuestUuid, target: str, name: str) -> None:
        """Remove a bitmap."""
        await (await self._owner(uuid)).bitmap_remove(uuid, target, name)

    async def switch_to_overlays(self, uuid: GuestUuid, overlays: dict[str, str], ready: Ready = alone) -> Span:
        """Redirect the writes of all targets at one instant, or of none; tells when that was."""
        return await (await self._owner(uuid)).switch_to_overlays(uuid, overlays, ready)

    async def commit_start(self, uuid: GuestUuid, target: str, base: str) -> None:
        """Start the active commit into exactly ``base``."""
        await (await self._owner(uuid)).commit_start(uuid, target, base)

    async def commit_pivot(self, uuid: GuestUuid, target: str) -> None:
        """Finish a ready commit."""
        await (await self._owner(uuid)).commit_pivot(uuid, target)

    async def pull_start(self, uuid: GuestUuid, target: str) -> None:
        """Let QEMU fill a disk's image from below."""
        await (await self._owner(uuid)).pull_start(uuid, target)

    async def pull_stop(self, uuid: GuestUuid, target: str) -> None:
        """Give that up."""
        await (await self._owner(uuid)).pull_stop(uuid, target)

    async def job(self, uuid: GuestUuid, target: str) -> JobView | None:
        """Return the block job on a disk."""
        return await (await self._owner(uuid)).job(uuid, target)

    async def freeze(self, uuid: GuestUuid, timeout_s: float) -> int:
        """Freeze file systems."""
        return await (await self._owner(uuid)).freeze(uuid, timeout_s)

    async def thaw(self, uuid: GuestUuid, timeout_s: float) -> None:
        """Thaw file systems."""
        await (await self._owner(uuid)).thaw(uuid, timeout_s)

    async def redefine_source(self, uuid: GuestUuid, target: str, layer_path: str, layer_format: str) -> None:
        """Point a shut-off guest's disk at an image."""
        await (await self._owner(uuid)).redefine_source(uuid, target, layer_path, layer_format)

    async def passphrase(self, secret: str) -> Passphrase | None:
        """Return what opens an encrypted image; libvirt alone keeps such things."""
        keepers = [member.hypervisor for member in self.members if member.name == "libvirt"]
        if secret and not keepers:
            raise HypervisorFailed(f"nobody knows the secret {secret}", hint="is hypervisor.libvirt_uri configured?")
        return await keepers[0].passphrase(secret) if secret else None

    async def fleecer(self, uuid: GuestUuid) -> Fleecer:
        """Return who fleeces the guest's disks."""
        return await (await self._owner(uuid)).fleecer(uuid)

    async def resume_after_error(self, uuid: GuestUuid) -> None:
        """Let a guest go on that was stopped by an I/O error."""
        await (await self._owner(uuid)).resume_after_error(uuid)

    async def start(self, uuid: GuestUuid) -> None:
        """Start a guest."""
        await (await self._owner(uuid)).start(uuid)

    async def shutdown(self, uuid: GuestUuid, timeout_s: float) -> None:
        """Shut a guest down."""
        await (await self._owner(uuid)).shutdown(uuid, timeout_s)
