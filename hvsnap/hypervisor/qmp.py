"""One bare guest through its QMP socket: what :class:`hvsnap.ports.Hypervisor` asks, for a guest without libvirt.

Its launcher knows only its own command line. So what hvsnap changes in the guest's QEMU is gone when the guest is
started again, and where a guest's disks lie is remembered from the last look at it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvsnap.errors import (
    AgentMissing,
    AgentUnavailable,
    CatalogFailed,
    GuestUnknown,
    HypervisorFailed,
    HypervisorUnreachable,
    NoSpace,
)
from hvsnap.hypervisor import qemu_nodes, qmp_view
from hvsnap.hypervisor.agent import GuestAgent
from hvsnap.hypervisor.qmp_connection import ConnectionLost, GuestOff, QmpConnection
from hvsnap.hypervisor.qmp_fleece import QmpFleecer
from hvsnap.hypervisor.qmp_look import QmpLook
from hvsnap.hypervisor.qmp_memory import Seen, disks_while_off, identity, with_layers
from hvsnap.hypervisor.qmp_redirect import QmpRedirect
from hvsnap.hypervisor.shutting_down import Ways, shut_down
from hvsnap.instant import Ready, Span, alone
from hvsnap.model import Bitmap, DiskActivity, DiskView, GuestState, GuestUuid, GuestView, Layer, Traits
from hvsnap.ports import Census, Fleecer, GuestMemory, JobView
from hvsnap.secret import Passphrase

log = logging.getLogger(__name__)

ASK_S = 10.0


@dataclass(frozen=True, slots=True)
class BareGuest:
    """What the configuration says of a bare guest. ``disks`` are known by it alone while the guest is off."""

    name: str
    socket: str
    agent: str = ""
    fleece: bool = True
    disks: Mapping[str, Layer] = field(default_factory=dict)


class QmpHypervisor:
    """The hypervisor of one bare guest. Implements :class:`hvsnap.ports.Hypervisor`."""

    def __init__(
        self, guest: BareGuest, host_id: str, memory: GuestMemory, run_dir: str, on_change: Callable[[], None]
    ) -> None:
        self.name = guest.name
        self._guest = guest
        self._host_id = host_id
        self._memory = memory
        self._connection = QmpConnection(guest.name, guest.socket, self._event, on_change)
        self._on_change = on_change
        self._agent = GuestAgent(guest.name, guest.agent) if guest.agent else None
        self._look = QmpLook(self._connection)
        self._changing = asyncio.Lock()
        self._redirect = QmpRedirect(self._connection, self._look)
        self._fleecer = QmpFleecer(self._connection, self._look, run_dir)
        self._seen: Seen | None = None
        self._switching = False

    async def run(self) -> None:
        """Keep the connection up, until cancelled: events tell of changes at once."""
        await self._connection.keep_up()

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    def _event(self, name: str, data: dict[str, Any]) -> None:
        self._redirect.event(name, data)
        if name == "DEVICE_DELETED":
            self._look.forget_devices()
        if name in ("SHUTDOWN", "RESET", "DEVICE_DELETED", "STOP", "RESUME"):
            self._on_change()

    # -- looking ----------------------------------------------------------------------------------

    async def versions(self) -> dict[str, str]:
        """Return the version of the guest's QEMU."""
        return {"qemu": ".".join(str(part) for part in await self._look.version())}

    async def traits(self) -> Traits:
        """Return nothing: what a guest's launcher does is its own affair."""
        return Traits({}, {})

    async def guests(self) -> list[GuestView]:
        """Return the guest, in a list."""
        return [await self._view()]

    async def census(self) -> Census:
        """Return the guest; raises what keeps it from being seen."""
        return Census(await self.guests(), {})

    async def guest(self, uuid: GuestUuid) -> GuestView:
        """Return the guest; raises :class:`GuestUnknown` when it is another one."""
        view = await self._view()
        if view.uuid != uuid:
            raise GuestUnknown(f"there is no guest {uuid}")
        return view

    async def _view(self) -> GuestView:
        """Return the guest; one that ends while it is looked at is off at the second look."""
        try:
            return await self._view_once()
        except ConnectionLost:
            return await self._view_once()

    async def _view_once(self) -> GuestView:
        seen = await self._recalled()
        try:
            shown = str((await self._connection.execute("query-uuid"))["UUID"])
            status = await self._connection.execute("query-status")
            disks = tuple(one.view for one in await self._look.attachments())
        except GuestOff:
            uuid = identity(None, seen, self._host_id, self.name)
            disks = disks_while_off(seen, self._guest.disks)
            if seen is None and disks:
                await self._remember(Seen(uuid, disks))  # what is captured now is this guest's when it is started
            return self._shown(uuid, GuestState.OFF, disks, instance="")
        uuid = identity(shown, seen, self._host_id, self.name)
        state = qmp_view.guest_state(status["status"], running=status["running"])
        if not self._switching:
            try:
                await self._remember(Seen(uuid, disks))
            except (CatalogFailed, NoSpace) as error:
                log.warning("what guest %s looks like cannot be remembered: %s", self.name, error.message)
        return self._shown(uuid, state, disks, instance=self._connection.instance)

    def _shown(self, uuid: GuestUuid, state: GuestState, disks: tuple[DiskView, ...], *, instance: str) -> GuestView:
        return GuestView(
            uuid, self.name, state, persistent=True, disks=disks, fleece=self._guest.fleece, instance=instance
        )

    async def _recalled(self) -> Seen | None:
        if self._seen is None:
            self._seen = Seen.of(await self._memory.recall(self.name))
        return self._seen

    async def _remember(self, seen: Seen) -> None:
        if seen != self._seen:
            await self._memory.remember(self.name, seen.as_json())
            self._seen = seen

    async def definition(self, uuid: GuestUuid) -> str:
        """Return what is known of the guest, as JSON: there is no other definition than its launcher's."""
        view = await self.guest(uuid)
        return json.dumps({"qmp_guest": view.name, **Seen(view.uuid, view.disks).as_json()})

    async def bitmaps(self, uuid: GuestUuid, target: str) -> list[Bitmap]:
        """Return the bitmaps of the running guest's active image."""
        node = (await self._look.attachment(target)).format_node
        return qemu_nodes.bitmaps(await self._look.nodes(), node)

    async def activity(self, uuid: GuestUuid, targets: Sequence[str]) -> dict[str, DiskActivity]:
        """Return what the running guest has asked of these disks so far, whatever images lie under them."""
        found = qmp_view.activities(await self._connection.execute("query-blockstats"))
        return {target: found[target] for target in targets if target in found}

    async def job(self, uuid: GuestUuid, target: str) -> JobView | None:
        """Return the block job on a disk, anybody's; an active commit that failed is raised, once."""
        try:
            return await self._redirect.job(target)
        except GuestOff:
            return None

    # -- bitmaps ----------------------------------------------------------------------------------

    async def bitmap_add(self, uuid: GuestUuid, names: Mapping[str, str], granularity: int) -> None:
        """Add a persistent recording bitmap to the active image of every target, or of none."""
        actions = []
        for target, name in names.items():
            node = (await self._look.attachment(target)).format_node
            data = {"node": node, "name": name, "granularity": granularity, "persistent": True}
            actions.append({"type": "block-dirty-bitmap-add", "data": data})
        if actions:
            await self._connection.execute("transaction", actions=actions)

    async def bitmap_remove(self, uuid: GuestUuid, target: str, name: str) -> None:
        """Remove a bitmap; QEMU may answer well and have failed to write the image, so it is asked again."""
        node = (await self._look.attachment(target)).format_node
        if not await self._has_bitmap(node, name):
            return
        await self._connection.execute("block-dirty-bitmap-remove", node=node, name=name)
        if await self._has_bitmap(node, name):
            raise HypervisorFailed(f"QEMU did not remove the bitmap {name} of {target}")

    async def _has_bitmap(self, node: str, name: str) -> bool:
        return any(bitmap.name == name for bitmap in qemu_nodes.bitmaps(await self._look.nodes(), node))

    # -- overlays ---------------------------------------------------------------------------------

    async def switch_to_overlays(self, uuid: GuestUuid, overlays: dict[str, str], ready: Ready = alone) -> Span:
        """Redirect the writes of all targets to their overlays at one instant, or of none; tells when that was.

        Where the disks will be is remembered before: if QEMU dies right after, the overlays hold the newest data.
        """
        async with self._changing:
            before = await self._view()
            self._switching = True  # until it is done, other looks must not remember what was before
            seen = Seen(before.uuid, before.disks)
            for target, overlay in overlays.items():
                layers = next(disk.layers for disk in before.disks if disk.target == target)
                seen = with_layers(seen, target, (Layer(overlay, "qcow2"), *layers))
            try:
                await self._remember(seen)
                return await self._redirect.switch(overlays, ready)
            finally:
                self._switching = False
                await asyncio.shield(self._look_again())

    async def _look_again(self) -> None:
        """Remember what there is; while nothing can be seen, what was intended stays remembered."""
        try:
            if self._connection.up:
                await self._view()
        except (HypervisorFailed, HypervisorUnreachable):
            return

    async def commit_start(self, uuid: GuestUuid, target: str, base: str) -> None:
        """Start the active commit into exactly ``base``."""
        async with self._changing:
            await self._redirect.commit_start(target, base)

    async def commit_pivot(self, uuid: GuestUuid, target: str) -> None:
        """Finish a ready commit: the guest writes to the base again."""
        async with self._changing:
            await self._redirect.commit_pivot(target)
            await self._view()

    async def pull_start(self, uuid: GuestUuid, target: str) -> None:
        """Let QEMU copy what lies below a disk's image into it; it ends by itself."""
        node = (await self._look.attachment(target)).format_node
        await self._connection.execute("block-stream", **{"job-id": _pull_job(target), "device": node})

    async def pull_stop(self, uuid: GuestUuid, target: str) -> None:
        """Give that up; what was copied stays."""
        await self._connection.execute("job-cancel", id=_pull_job(target))

    async def redefine_source(self, uuid: GuestUuid, target: str, layer_path: str, layer_format: str) -> None:
        """Remember which image a shut-off guest's disk has: its launcher never knew of another."""
        seen = await self._recalled()
        if seen is not None:
            await self._remember(with_layers(seen, target, (Layer(layer_path, layer_format),)))

    async def passphrase(self, secret: str) -> Passphrase | None:
        """Return None: nobody has told this daemon of a bare guest's secrets."""
        return None

    async def fleecer(self, uuid: GuestUuid) -> Fleecer:
        """Return who fleeces the guest's disks."""
        return self._fleecer

    # -- the guest itself -------------------------------------------------------------------------

    async def freeze(self, uuid: GuestUuid, timeout_s: float) -> int:
        """Freeze file systems through the agent, and return how many were.

        Raises :class:`AgentMissing` where nobody is there to be asked: QEMU knows that, without a time-out.
        """
        if self._agent is None:
            why = f"guest {self.name} has no agent socket in the configuration"
            raise AgentMissing(why, hint=f"name it: hypervisor.qmp.{self.name}.agent")
        status = await self._connection.execute("query-status")
        if not status["running"]:
            raise AgentMissing(f"the guest's file systems cannot be frozen: it is {status['status']}")
        for device in await self._connection.execute("query-chardev"):
            # Whether anybody in the guest has opened the other end of the agent's port.
            if f"unix:{self._guest.agent}," in f"{device['filename']}," and not device["frontend-open"]:
                raise AgentMissing("the guest's file systems cannot be frozen: no guest agent is running in it")
        return await self._agent.freeze(timeout_s)

    async def thaw(self, uuid: GuestUuid, timeout_s: float) -> None:
        """Thaw file systems; thawed ones are no error. Without an agent nothing was frozen."""
        if self._agent is not None:
            try:
                await self._agent.thaw(timeout_s)
            except AgentUnavailable as error:
                raise HypervisorFailed(error.message) from error

    async def resume_after_error(self, uuid: GuestUuid) -> None:
        """Let the guest go on that QEMU stopped at an I/O error: it repeats what failed."""
        if not (await self._view()).active:
            return
        if (await self._connection.execute("query-status"))["status"] == "io-error":
            await self._connection.execute("cont")

    async def start(self, uuid: GuestUuid) -> None:
        """Raise, unless the guest runs: only its launcher can start it."""
        if not (await self._view()).active:
            hint = "start it as you always do: with its service unit or script"
            raise HypervisorFailed(f"guest {self.name} can only be started by its own launcher", hint=hint)

    async def shutdown(self, uuid: GuestUuid, timeout_s: float) -> None:
        """Shut the guest down gracefully; raises :class:`HypervisorFailed` if it is still there at the deadline."""
        agent = self._agent

        async def ask_agent() -> None:
            if agent is None:
                raise AgentUnavailable("none is configured")
            await agent.shut_down(ASK_S)

        async def press() -> None:
            try:
                await self._connection.execute("system_powerdown")
            except (HypervisorFailed, HypervisorUnreachable):
                if await is_active():  # else it was off before it could be asked
                    raise

        async def is_active() -> bool:
            return (await self._view()).active

        force = "end its QEMU (`quit` in its monitor), which some launchers keep after their guest,"
        await shut_down(self.name, Ways(is_active, ask_agent, press, force), timeout_s)


def _pull_job(target: str) -> str:
    """Return the name of the job that fills a disk; QEMU takes letters, digits and three signs."""
    return f"{qemu_nodes.OURS}p-{re.sub('[^A-Za-z0-9._-]', '-', target)}"
