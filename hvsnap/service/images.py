"""Images: snapshots of system disks as templates for new disks (SERVICE 4.5, 7.4)."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Protocol

from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import BadRequest, HvsnapError, ImageUnknown, NotFound, Refused
from hvsnap.happenings import image_payload
from hvsnap.model import Disk, Image, ImageId, Operation, OperationId, Progress, Snapshot, State, new_id
from hvsnap.ports import Clock
from hvsnap.restore import export
from hvsnap.restore.export import Exported
from hvsnap.service.disks import check_place
from hvsnap.service.names import check_description, check_name
from hvsnap.service.recovery import Undo
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.tasks import TaskRun, Tasks, TaskView
from hvsnap.service.uses import Uses
from hvsnap.service.views import when
from hvsnap.upkeep.images import ImageKeeper

log = logging.getLogger(__name__)

NEVER_BELOW = ("/dev", "/proc", "/sys")
_LIKE_AN_ID = re.compile(r"[a-z]-[a-z2-7]{12}")


class Exporter(Protocol):
    """Writes images to files: :class:`hvsnap.restore.export.ImageExporter`."""

    async def check(self, image: Image, path: str) -> tuple[Snapshot, int]:
        """Check a request; nothing is touched."""
        ...

    async def create(self, image: Image, path: str, report: Callable[[Progress], None]) -> Exported:
        """Write the file, or leave nothing of it."""
        ...

    async def recover(self, operation: Operation) -> bool:
        """Settle what a crash left of one; True if the file was whole, and stays."""
        ...


def pick_image(images: Sequence[Image], name: str) -> Image:
    """Return the image of that id or name. Raises :class:`ImageUnknown`."""
    for image in images:
        if name in (image.id, image.name):
            return image
    raise ImageUnknown(f"there is no image {name[:128]}")


class Images:
    """Makes, lists, exports and deletes images."""

    def __init__(
        self,
        catalog: Catalog,
        snapshots: Snapshots,
        keeper: ImageKeeper,
        exporter: Exporter,
        tasks: Tasks,
        uses: Uses,
        clock: Clock,
        *,
        own_directories: Sequence[str],
    ) -> None:
        self._catalog = catalog
        self._snapshots = snapshots
        self._keeper = keeper
        self._exporter = exporter
        self._tasks = tasks
        self._uses = uses
        self._clock = clock
        self._forbidden = (*NEVER_BELOW, *own_directories)

    async def listing(self) -> wire.ImageList:
        """Return all images, by name."""
        return wire.ImageList(images=[await self._view(image) for image in await self._catalog.images()])

    async def create(self, body: wire.ImageCreate) -> wire.Image:
        """Promote a snapshot of a system disk (SERVICE 7.4).

        Raises :class:`SnapshotUnknown`, :class:`BadRequest`, :class:`Refused`, :class:`SnapshotInUse`.
        """
        name = check_name(body.name)
        if _LIKE_AN_ID.fullmatch(name):
            raise BadRequest(f"the name {name} looks like an id", hint="images go by name or id: choose another name")
        description = check_description(body.description)
        row = await self._snapshots.row(body.snapshot)
        disk = await self._catalog.disk(row.disk)
        if row.state is not State.ACCOMPLISHED:
            raise Refused(f"snapshot {row.id} is {row.state}", hint="only accomplished snapshots can become images")
        if not disk.system:
            hint = f"choose a snapshot of the disk that {disk.guest_name} boots from"
            raise Refused(f"snapshot {row.id} is of {disk.guest_name}/{disk.target}, a data disk", hint=hint)
        image = Image(ImageId(new_id("i")), name, description, row.id, self._clock.now())
        with self._uses.hold_snapshot(row.id, f"becoming image {name}"):
            await self._keeper.create(image, image_payload(disk, image))
        return _view(image, row, disk)

    async def delete(self, name: str) -> wire.Image:
        """Delete an image; disks that were made of it stay as they are, and so does its snapshot.

        Raises :class:`ImageUnknown`.
        """
        image = pick_image(await self._catalog.images(), name)
        view = await self._view(image)
        disk = await self._catalog.disk((await self._catalog.snapshot(image.snapshot)).disk)
        await self._keeper.delete(image.id, image_payload(disk, image))
        return view

    async def export(self, name: str, path: str) -> TaskView:
        """Start writing an image to a new file. Raises what can be told beforehand: nothing was touched then."""
        image = pick_image(await self._catalog.images(), name)
        path = await asyncio.to_thread(check_place, path, self._forbidden)
        row, _blocks = await self._exporter.check(image, path)
        disk = await self._catalog.disk(row.disk)

        async def work(run: TaskRun) -> wire.ImageExported:
            with (
                self._uses.hold_snapshot(row.id, f"being exported to {path}"),
                self._uses.hold_path(path, "being made"),
            ):
                run.step("writing and compressing")
                made = await self._exporter.create(image, path, run.progress)
            return wire.ImageExported(
                image=image.id,
                snapshot=row.id,
                path=path,
                size_bytes=made.size_bytes,
                written_bytes=made.written_bytes,
                file_bytes=made.file_bytes,
            )

        return self._tasks.start(export.KIND, f"{image.name} to {path}", work, guest=disk.guest_uuid)

    async def _view(self, image: Image) -> wire.Image:
        row = await self._catalog.snapshot(image.snapshot)
        return _view(image, row, await self._catalog.disk(row.disk))


def _view(image: Image, row: Snapshot, disk: Disk) -> wire.Image:
    return wire.Image(
        id=image.id,
        name=image.name,
        description=image.description,
        snapshot=row.id,
        disk=disk.id,
        guest=disk.guest_name,
        target=disk.target,
        size_bytes=row.size_bytes,
        created_at=when(image.created_at),
    )


class ExportRecovery:
    """Removes files that a crash left half-written: of exports, or of another ``kind`` of work on a file."""

    def __init__(self, catalog: Catalog, exporter: Undo, uses: Uses, kind: str = export.KIND) -> None:
        self._catalog = catalog
        self._exporter = exporter
        self._kind = kind
        self._uses = uses
        self._turn = asyncio.Lock()

    async def recover(self, only: Container[OperationId] | None = None) -> list[tuple[Operation, HvsnapError | None]]:
        """Settle what is open and nobody works on; return each, and why it could not be settled."""
        async with self._turn:
            # First who is at work, then the journal: work that ends in between must not be taken for a crash's.
            held = self._uses.held()
            outcome: list[tuple[Operation, HvsnapError | None]] = []
            for operation in await self._catalog.operations(self._kind):
                path = str(operation.facts["target"])
                if (only is None or operation.id in only) and path not in held | self._uses.held():
                    outcome += await self._settle(operation, path)
            return outcome

    async def _settle(self, operation: Operation, path: str) -> list[tuple[Operation, HvsnapError | None]]:
        try:
            with self._uses.hold_path(path, "being recovered"):
                try:
                    operation = await self._catalog.operation(operation.id)
                except NotFound:
                    return []  # it has ended by itself meanwhile
                if await self._exporter.recover(operation):
                    operation = replace(operation, step=export.Step.NAMED)
        except HvsnapError as error:
            log.warning("%s %s cannot be settled yet: %s", operation.kind, operation.id, error.message)
            return [(operation, error)]
        log.info("%s %s was settled", operation.kind, operation.id)
        return [(operation, None)]
