"""Looking at a bare guest's QEMU: the questions behind :mod:`hvsnap.hypervisor.qmp_view`."""

from __future__ import annotations

from typing import Any

from hvsnap.errors import HypervisorFailed
from hvsnap.hypervisor import qmp_view
from hvsnap.hypervisor.qmp_connection import GuestAway, QmpConnection
from hvsnap.hypervisor.qmp_view import Answers, Attachment, Device

Version = tuple[int, ...]


class QmpLook:
    """Looks at the present. Kept are a device's properties alone, which never change while it is there.

    They are most of a look: seven questions a disk, a millisecond each while the guest writes.
    """

    def __init__(self, connection: QmpConnection) -> None:
        self._connection = connection
        self._devices: dict[str, Device] = {}
        self._devices_of = 0

    def forget_devices(self) -> None:
        """Ask for devices' properties anew: one has gone, and another may take its name."""
        self._devices = {}

    async def version(self) -> Version:
        """Return QEMU's version."""
        found = (await self._connection.execute("query-version"))["qemu"]
        return (int(found["major"]), int(found["minor"]), int(found["micro"]))

    async def nodes(self) -> list[dict[str, Any]]:
        """Return all named block nodes, flat."""
        found: list[dict[str, Any]] = await self._connection.execute("query-named-block-nodes", flat=True)
        return found

    async def graph(self) -> dict[str, Any]:
        """Return the block graph as QEMU tells it."""
        found: dict[str, Any] = await self._connection.execute("x-debug-query-block-graph")
        return found

    async def attachments(self) -> list[Attachment]:
        """Return the disks that are attached now, and where they are in QEMU."""
        block = await self._connection.execute("query-block")
        devices = {entry["qdev"]: await self._device(entry["qdev"]) for entry in block if entry.get("qdev")}
        nodes, graph = await self.nodes(), await self.graph()
        return qmp_view.attachments(Answers(block, nodes, graph, devices, self._connection.directory))

    async def attachment(self, target: str) -> Attachment:
        """Return one disk; raises :class:`HypervisorFailed` when it is gone."""
        return qmp_view.find(await self.attachments(), target)

    async def _device(self, qdev: str) -> Device:
        if self._devices_of != self._connection.number:
            self._devices, self._devices_of = {}, self._connection.number
        kept = self._devices  # a device that goes while it is asked about is not kept
        if qdev not in kept:
            kept[qdev] = await self._asked(qdev)
        return kept[qdev]

    async def _asked(self, qdev: str) -> Device:
        path = qmp_view.qom_path(qdev)
        properties = await self._properties(path)
        controller: dict[str, Any] = {}
        if str(properties.get("type", "")).startswith("scsi-"):
            # A SCSI disk's bus is a child of its controller, which has the I/O thread.
            bus = str(properties.get("parent_bus", ""))
            controller = await self._properties(bus.rpartition("/")[0]) if "/" in bus else {}
        return Device(path, properties, controller)

    async def _properties(self, path: str) -> dict[str, Any]:
        """Return those of the properties that an object has; of one that is gone, none."""
        found = {}
        for name in qmp_view.PROPERTIES:
            try:
                found[name] = await self._connection.execute("qom-get", path=path, property=name)
            except GuestAway:
                raise
            except HypervisorFailed:
                continue
        return found
