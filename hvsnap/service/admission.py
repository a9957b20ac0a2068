"""Whether a disk may be captured now: the rules of SERVICE 2.6 and 3, checked before anything has begun."""

from __future__ import annotations

from hvsnap.capture.facts import KIND, CaptureFacts, Mode
from hvsnap.capture.support import ImageTraits, Way, refusal
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import CaptureRunning, ChainFull, Refused
from hvsnap.hypervisor import images
from hvsnap.hypervisor.images import ImageInfo
from hvsnap.model import Disk, Operation, State
from hvsnap.ports import Hypervisor
from hvsnap.service.inventory import Found, Inventory
from hvsnap.service.lanes import Lanes
from hvsnap.service.uses import Uses


class Admission:
    """Admits disks to captures. The caller lets one request in at a time."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        catalog: Catalog,
        inventory: Inventory,
        uses: Uses,
        lanes: Lanes,
        *,
        snapshots_per_disk: int,
        sealed: bool,
    ) -> None:
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._inventory = inventory
        self._uses = uses
        self._lanes = lanes
        self._snapshots_per_disk = snapshots_per_disk
        self._sealed = sealed

    async def admit(self, found: Found, *, wait: bool) -> Disk:
        """Check the rules for one disk and return its row; nothing has begun when this refuses."""
        info = await images.image_info(found.view.top.path, found.view.top.format)
        where = f"disk {found.view.target} of {found.guest.name}"
        await self._check_support(found, info, where)
        disk = await self._inventory.register(found, info.size_bytes, encrypted=info.encrypted)
        if disk.encrypted and not self._sealed:
            hint = "its data would be stored in plain: configure an encrypted store"
            raise Refused(f"{where} is marked as encrypted, and the store has no key", hint=hint)
        self._uses.check_disk(disk.id)
        for operation in await self._catalog.operations():
            await self._check_operation(operation, disk, where)
        for run in self._lanes.of_disk(disk.id):
            # A capture whose snapshot is accomplished only has to bring the guest back: that is waited for.
            if not wait and not run.settling:
                raise CaptureRunning(f"{where} is being captured (snapshot {run.snapshots[0].id})")
        nodes = [s for s in await self._catalog.snapshots(disk.id) if s.state is not State.FAILED]
        if len(nodes) >= self._snapshots_per_disk:
            raise ChainFull(f"the chain of {where} holds {len(nodes)} snapshots already")
        return disk

    async def _check_support(self, found: Found, info: ImageInfo, where: str) -> None:
        """Refuse an image that cannot be captured as its guest is now; its key must be there."""
        guest, secret = found.guest, found.view.secret
        image = ImageTraits(info.encrypted, await images.encrypted_below(info), secret=bool(secret))
        mode = Mode.OFFLINE if not guest.active else Mode.FLEECE if guest.fleece else Mode.REDIRECT
        why = refusal(where, Way(mode, bare=guest.instance is not None), image, sealed=self._sealed)
        if why is not None:
            raise why
        if info.encrypted:
            await self._hypervisor.passphrase(secret)

    async def _check_operation(self, operation: Operation, disk: Disk, where: str) -> None:
        """Refuse a disk that something left open by a crash still concerns."""
        if operation.kind == KIND:
            facts = CaptureFacts.of(operation)
            mine = [one for one in facts.disks if one.disk == disk.id]
            if mine and self._lanes.of_snapshot(mine[0].snapshot) is None:
                hint = "`hvsnap recover` finishes it, and `hvsnap doctor` says what stands in the way"
                raise CaptureRunning(f"an interrupted capture of {where} is not settled yet", hint=hint)
        elif operation.facts.get("disk") == disk.id:
            hint = "wait for it, or finish it with `hvsnap recover`"
            raise CaptureRunning(f"a {operation.kind} of {where} is not finished", hint=hint)
