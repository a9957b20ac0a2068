"""What a guest's launcher runs before it starts the guest: ``hvsnap recover --image PATH``, where no daemon runs.

A bare guest that died while its writes were redirected has its newest data in an overlay that its launcher knows
nothing of. Merging it needs the catalog's journal and the images alone: no store, whose absence must keep no guest
from starting.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from hvsnap import wire
from hvsnap.capture.facts import KIND
from hvsnap.capture.freeze import Freezer
from hvsnap.capture.settle import Settle
from hvsnap.catalog.catalog import Catalog
from hvsnap.config import Settings
from hvsnap.errors import HvsnapError
from hvsnap.guard import StartGuard
from hvsnap.house import SystemClock, assembled, close_in_time, members, private_directory
from hvsnap.hypervisor.fleet import Fleet
from hvsnap.model import Operation
from hvsnap.service.recovery import Only, Recovery, disks_of_image, operations_on


def recover_image(settings: Settings, image: str) -> wire.Recovery:
    """Make an image ready for its guest to be started; what could not be settled stands in the answer.

    Raises :class:`StoreBusy` when a daemon runs (it does this itself, when asked), and what opening the catalog raises.
    """
    return asyncio.run(_recover_image(settings, image))


async def _recover_image(settings: Settings, image: str) -> wire.Recovery:
    if not await asyncio.to_thread(Path(settings.state_dir, "catalog.db").exists):
        return wire.Recovery(operations=[])  # nothing was ever captured here
    async with contextlib.AsyncExitStack() as stack:
        catalog = await Catalog.open(Path(settings.state_dir), SystemClock())
        stack.push_async_callback(catalog.close)
        open_now = await operations_on(catalog, await disks_of_image(catalog, image))
        if all(operation.kind == KIND for operation in open_now):
            private = await asyncio.to_thread(private_directory, settings.run_dir)
            fleet = Fleet(members(settings, catalog, lambda *_event: None, str(private)))
            stack.push_async_callback(close_in_time, fleet)
            settle = Settle(fleet, Freezer(fleet, catalog), catalog, StartGuard(Path(settings.state_dir)))

            async def settle_open(only: Only) -> list[tuple[Operation, HvsnapError | None]]:
                return await settle.settle_open(lambda one: only is not None and one.id not in only)

            return await Recovery(catalog, [settle_open]).recover_image(image)
    # A rollback is half done: its data is in the store.
    async with assembled(settings) as house:
        return await house.service.recovery.recover_image(image)
