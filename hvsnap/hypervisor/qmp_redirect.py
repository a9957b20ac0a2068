"""Redirecting a bare guest's writes to overlays, and merging them back: by QMP what libvirt does for its guests."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any

from hvsnap.errors import HypervisorFailed, HypervisorUnreachable, Refused
from hvsnap.hypervisor.qemu_nodes import OURS, Graph
from hvsnap.hypervisor.qmp_connection import QmpConnection
from hvsnap.hypervisor.qmp_look import QmpLook
from hvsnap.hypervisor.qmp_view import find
from hvsnap.instant import Ready, Span, alone
from hvsnap.ports import JobView

PIVOT_S = 60.0
"""A pivot drains the disk and writes the overlay's last requests to the image; then the job is gone."""

POLL_S = 0.02
_OVERLAY, _COMMIT = f"{OURS}o-", f"{OURS}c-"


def _key(overlay: str) -> str:
    return hashlib.blake2b(overlay.encode(), digest_size=6).hexdigest()


def overlay_node(overlay: str) -> str:
    """Return the name of an overlay's block node: found again by its path after any crash."""
    return f"{_OVERLAY}{_key(overlay)}"


class QmpRedirect:
    """Overlays of one guest. The caller lets one change happen at a time."""

    def __init__(self, connection: QmpConnection, look: QmpLook) -> None:
        self._connection = connection
        self._look = look
        self._failed: dict[str, str] = {}

    def event(self, name: str, data: dict[str, Any]) -> None:
        """Take note of a commit that failed: its job is gone by the time that anybody asks for it."""
        job = str(data.get("device", ""))
        if name == "BLOCK_JOB_COMPLETED" and job.startswith(_COMMIT) and data.get("error"):
            self._failed[job] = str(data["error"])

    async def switch(self, overlays: dict[str, str], ready: Ready = alone) -> Span:
        """Redirect the writes of all targets to their overlays at one instant, or of none; tells when that was.

        The overlays' nodes are QEMU's own (``blockdev-snapshot-sync``), not ours (``blockdev-add``): so QEMU closes an
        overlay by itself as soon as nobody is on it, at the pivot above all, and the mark of that in the overlay is
        right whether the daemon lives or not.
        """
        attached = await self._look.attachments()
        actions = []
        for target, overlay in overlays.items():
            disk = find(attached, target)
            if disk.root != disk.format_node:
                hint = "take the filter away, or capture the guest by fleece (its `capture` in the configuration)"
                raise Refused(f"a filter ({disk.root}) lies above the image of disk {target}", hint=hint)
            data = {
                "node-name": disk.format_node,
                "snapshot-file": overlay,
                "snapshot-node-name": overlay_node(overlay),
                "format": "qcow2",
                "mode": "existing",
            }
            actions.append({"type": "blockdev-snapshot-sync", "data": data})
        await ready()
        began_s = time.monotonic()
        await self._connection.execute("transaction", actions=actions)
        return Span(began_s, time.monotonic())

    async def job(self, target: str) -> JobView | None:
        """Return the block job on a disk, anybody's; a commit of ours that failed is raised, once."""
        disk = await self._look.attachment(target)
        found = Graph(await self._look.graph()).jobs_on(set(disk.nodes))
        jobs = {job["device"]: job for job in await self._connection.execute("query-block-jobs")}
        for name in found:
            if name in jobs:
                raw = jobs[name]
                kind = "active-commit" if name.startswith(_COMMIT) and raw["type"] == "commit" else str(raw["type"])
                return JobView(kind, raw["offset"], raw["len"], bool(raw["ready"]))
        for layer in disk.view.layers:
            error = self._failed.pop(_commit_job(layer.path), None)
            if error is not None:
                raise HypervisorFailed(f"merging {layer.path} into the image below it failed: {error}")
        return None

    async def commit_start(self, target: str, base: str) -> None:
        """Start the active commit into exactly ``base``, never into its own backing file."""
        disk = await self._look.attachment(target)
        below = [node for layer, node in zip(disk.view.layers, disk.chain, strict=True) if layer.path == base]
        if not below:
            raise HypervisorFailed(f"{base} is not among the images of disk {target}")
        job = _commit_job(disk.view.top.path)
        self._failed.pop(job, None)
        arguments = {"job-id": job, "device": disk.format_node, "top-node": disk.format_node, "base-node": below[0]}
        await self._connection.execute("block-commit", **arguments)

    async def commit_pivot(self, target: str) -> None:
        """Finish a ready commit, and return when the guest writes to the base; QEMU has closed the overlay then."""
        disk = await self._look.attachment(target)
        job = _commit_job(disk.view.top.path)
        await self._connection.execute("job-complete", id=job)
        deadline = time.monotonic() + PIVOT_S
        while any(one["device"] == job for one in await self._connection.execute("query-block-jobs")):
            if time.monotonic() > deadline:
                raise HypervisorUnreachable(f"the pivot of disk {target} did not end within {PIVOT_S:.0f} s")
            await asyncio.sleep(POLL_S)
        if (await self._look.attachment(target)).format_node == disk.format_node:
            why = self._failed.pop(job, "QEMU does not say why")
            raise HypervisorFailed(f"disk {target} is still on its overlay: {why}")


def _commit_job(overlay: str) -> str:
    return f"{_COMMIT}{_key(overlay)}"
