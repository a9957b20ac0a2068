"""The daemon at a glance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hvsnap import __version__, wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError
from hvsnap.model import State
from hvsnap.ports import Clock, Hypervisor
from hvsnap.service.requests import CapturesPort
from hvsnap.service.sampling import Sampler
from hvsnap.service.tasks import Tasks
from hvsnap.service.views import when

HYPERVISOR_TIMEOUT_S = 5.0


class StatusBoard:
    """Puts the status together."""

    def __init__(
        self,
        host_id: str,
        hypervisor: Hypervisor,
        catalog: Catalog,
        captures: CapturesPort,
        tasks: Tasks,
        mqtt_status: Callable[[], wire.MqttStatus],
        clock: Clock,
        sampler: Sampler,
    ) -> None:
        self._host_id = host_id
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._captures = captures
        self._tasks = tasks
        self._mqtt_status = mqtt_status
        self._clock = clock
        self._sampler = sampler
        self._started_at = clock.now()
        self.stopping = False

    async def status(self) -> wire.Status:
        """Return the status; a hypervisor that does not answer is part of it."""
        snapshots = await self._catalog.snapshots(state=State.ACCOMPLISHED)
        return wire.Status(
            version=__version__,
            host_id=self._host_id,
            started_at=when(self._started_at),
            uptime_s=max(0.0, self._clock.now() - self._started_at),
            stopping=self.stopping,
            guests=await self._guests(),
            disks=len({snapshot.disk for snapshot in snapshots}),
            snapshots=len(snapshots),
            captures=len(self._captures.busy_disks()),
            tasks=self._tasks.running,
            open_operations=len(await self._catalog.operations()),
            stored_bytes=(await self._catalog.figures()).store.live_bytes,
            days_to_full=await self._sampler.days_to_full(),
            mqtt=self._mqtt_status(),
        )

    async def _guests(self) -> int | None:
        try:
            return len(await asyncio.wait_for(self._hypervisor.guests(), HYPERVISOR_TIMEOUT_S))
        except (HvsnapError, TimeoutError):
            return None
