"""Guests through libvirt: what :class:`hvsnap.ports.Hypervisor` asks, done by libvirt's API and QEMU's monitor.

Overlays are made and merged through libvirt only: behind its back, a guest that crashes would be started from the
image underneath and lose writes. The monitor is used for what libvirt has no call for (dirty bitmaps); libvirt marks
such a guest as tainted (``custom-monitor``), which is harmless.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import libvirt
import libvirt_qemu

from hvsnap.errors import AgentMissing, AgentUnavailable, GuestUnknown, HypervisorFailed, Refused
from hvsnap.hypervisor import disk_encryption, domain_xml, qemu_nodes
from hvsnap.hypervisor.libvirt_connection import LibvirtConnection, Lifecycle
from hvsnap.hypervisor.libvirt_traits import traits
from hvsnap.hypervisor.shutting_down import Ways, shut_down
from hvsnap.instant import Ready, Span, alone
from hvsnap.model import Bitmap, DiskActivity, GuestState, GuestUuid, GuestView, Layer, Traits
from hvsnap.ports import Census, Fleecer, JobView
from hvsnap.secret import Passphrase

T = TypeVar("T")

AGENT_ANSWER_S = 5.0

_SNAPSHOT_FLAGS = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
)
_PAUSED = {libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PMSUSPENDED}
_OFF = {libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_NOSTATE}
_JOB_TYPES = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL: "pull",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY: "copy",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT: "commit",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT: "active-commit",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_BACKUP: "backup",
}


def _qmp(domain: Any, command: str, **arguments: object) -> Any:
    """Run one QMP command through libvirt. Raises :class:`HypervisorFailed` with QEMU's words."""
    request = json.dumps({"execute": command, "arguments": arguments})
    answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, request, 0))
    if "error" in answer:
        raise HypervisorFailed(f"QEMU: {command}: {answer['error'].get('desc', answer['error'])}")
    return answer["return"]


def _state(domain: Any) -> GuestState:
    state = domain.state()[0]
    if state in _OFF:
        return GuestState.OFF
    return GuestState.PAUSED if state in _PAUSED else GuestState.RUNNING


def _is_saved(domain: Any) -> bool:
    """Whether a guest that is off was saved (``virsh save``, ``managedsave``), as far as libvirt remembers."""
    state, reason = domain.state()
    return state in _OFF and (reason == libvirt.VIR_DOMAIN_SHUTOFF_SAVED or bool(domain.hasManagedSaveImage(0)))


def _view(domain: Any) -> GuestView:
    root = domain_xml.parse(domain.XMLDesc(0))
    state, persistent = _state(domain), bool(domain.isPersistent())
    autostart = persistent and state is GuestState.OFF and bool(domain.autostart())
    return domain_xml.guest_view(root, state, persistent=persistent, saved=_is_saved(domain), autostart=autostart)


def _node(domain: Any, target: str) -> tuple[str, list[dict[str, Any]]]:
    """Return the format node of a running guest's disk, and all named nodes as they were at that moment."""
    disk = domain_xml.find_disk(domain_xml.parse(domain.XMLDesc(0)), target)
    entry = qemu_nodes.device_entry(_qmp(domain, "query-block"), domain_xml.alias(disk))
    named = _qmp(domain, "query-named-block-nodes", flat=True)
    inserted = entry["inserted"]
    graph = _qmp(domain, "x-debug-query-block-graph") if qemu_nodes.needs_graph(inserted) else None
    return qemu_nodes.format_node(inserted, named, graph), named


def _activity(stats: Mapping[str, int]) -> DiskActivity:
    """Return libvirt's block statistics as activity; a figure that QEMU does not have is 0."""
    return DiskActivity(
        reads=stats.get(libvirt.VIR_DOMAIN_BLOCK_STATS_READ_REQ, 0),
        read_ns=stats.get(libvirt.VIR_DOMAIN_BLOCK_STATS_READ_TOTAL_TIMES, 0),
        writes=stats.get(libvirt.VIR_DOMAIN_BLOCK_STATS_WRITE_REQ, 0),
        write_ns=stats.get(libvirt.VIR_DOMAIN_BLOCK_STATS_WRITE_TOTAL_TIMES, 0),
        flushes=stats.get(libvirt.VIR_DOMAIN_BLOCK_STATS_FLUSH_REQ, 0),
        flush_ns=stats.get(libvirt.VIR_DOMAIN_BLOCK_STATS_FLUSH_TOTAL_TIMES, 0),
    )


class LibvirtHypervisor:
    """The guests of one libvirt daemon. Implements :class:`hvsnap.ports.Hypervisor`."""

    def __init__(
        self, uri: str, on_lifecycle: Lifecycle | None = None, on_connected: Callable[[], None] | None = None
    ) -> None:
        self.connection = LibvirtConnection(uri, on_lifecycle)
        self._on_connected = on_connected

    async def run(self) -> None:
        """Keep the connection up, until cancelled."""
        await self.connection.reconnect_loop(self._on_connected)

    async def _on(self, uuid: GuestUuid, function: Callable[[Any], T]) -> T:
        """Run ``function(domain)`` in a thread."""
        return await self.connection.call(lambda connection: function(connection.lookupByUUIDString(uuid)))

    async def close(self) -> None:
        """Close the connection."""
        await self.connection.close()

    async def versions(self) -> dict[str, str]:
        """Return the versions of libvirt and of the QEMU that it starts."""

        def dotted(number: int) -> str:
            return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"

        return await self.connection.call(
            lambda connection: {"libvirt": dotted(connection.getLibVersion()), "qemu": dotted(connection.getVersion())}
        )

    async def traits(self) -> Traits:
        """Return what libvirt tells of its host."""
        return await self.connection.call(traits)

    # -- looking ----------------------------------------------------------------------------------

    async def guests(self) -> list[GuestView]:
        """Return all guests; one that vanishes meanwhile is left out."""

        def work(connection: Any) -> list[GuestView]:
            views = []
            for domain in connection.listAllDomains():
                with contextlib.suppress(libvirt.libvirtError):
                    views.append(_view(domain))
            return sorted(views, key=lambda view: view.name)

        return await self.connection.call(work)

    async def census(self) -> Census:
        """Return all guests; none is left out while libvirt answers."""
        return Census(await self.guests(), {})

    async def guest(self, uuid: GuestUuid) -> GuestView:
        """Return one guest; raises :class:`GuestUnknown`."""
        return await self._on(uuid, _view)

    async def definition(self, uuid: GuestUuid) -> str:
        """Return the guest's XML as it would be started next (kept in manifests), without secrets."""
        return await self._on(uuid, lambda domain: str(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)))

    async def bitmaps(self, uuid: GuestUuid, target: str) -> list[Bitmap]:
        """Return the bitmaps of the running guest's active image."""

        def work(domain: Any) -> list[Bitmap]:
            node, named = _node(domain, target)
            return qemu_nodes.bitmaps(named, node)

        return await self._on(uuid, work)

    async def job(self, uuid: GuestUuid, target: str) -> JobView | None:
        """Return the block job on a disk, anybody's."""

        def work(domain: Any) -> JobView | None:
            if not domain.isActive():
                return None
            disk = domain_xml.find_disk(domain_xml.parse(domain.XMLDesc(0)), target)
            info = domain.blockJobInfo(target, 0)
            mirror = domain_xml.mirror_state(disk)
            if not info:
                # A job that has failed leaves its element, without a type, for another moment.
                return JobView(mirror.job, 0, 0, mirror.ready) if mirror is not None and mirror.job else None
            name = _JOB_TYPES.get(info["type"], "unknown")
            return JobView(name, info["cur"], info["end"], mirror is not None and mirror.ready)

        return await self._on(uuid, work)

    async def activity(self, uuid: GuestUuid, targets: Sequence[str]) -> dict[str, DiskActivity]:
        """Return what the running guest has asked of these disks so far, whatever images lie under them."""

        def work(domain: Any) -> dict[str, DiskActivity]:
            return {target: _activity(domain.blockStatsFlags(target, 0)) for target in targets}

        return await self._on(uuid, work)

    # -- bitmaps ----------------------------------------------------------------------------------

    async def bitmap_add(self, uuid: GuestUuid, names: Mapping[str, str], granularity: int) -> None:
        """Add a persistent recording bitmap to the active image of every target, or of none."""

        def work(domain: Any) -> None:
            actions = []
            for target, name in names.items():
                node, _named = _node(domain, target)
                data = {"node": node, "name": name, "granularity": granularity, "persistent": True}
                actions.append({"type": "block-dirty-bitmap-add", "data": data})
            _qmp(domain, "transaction", actions=actions)

        if names:
            await self._on(uuid, work)

    async def bitmap_remove(self, uuid: GuestUuid, target: str, name: str) -> None:
        """Remove a bitmap; QEMU may answer well and have failed to write the image, so it is asked again."""

        def present(domain: Any) -> tuple[str, bool]:
            node, named = _node(domain, target)
            return node, any(bitmap.name == name for bitmap in qemu_nodes.bitmaps(named, node))

        def work(domain: Any) -> None:
            node, there = present(domain)
            if not there:
                return
            _qmp(domain, "block-dirty-bitmap-remove", node=node, name=name)
            if present(domain)[1]:
                raise HypervisorFailed(f"QEMU did not remove the bitmap {name} of {target}")

        await self._on(uuid, work)

    # -- overlays ---------------------------------------------------------------------------------

    async def switch_to_overlays(self, uuid: GuestUuid, overlays: dict[str, str], ready: Ready = alone) -> Span:
        """Redirect the writes of all targets to their overlays at one instant, or of none; tells when that was."""
        wanted = await self._on(uuid, lambda domain: domain_xml.snapshot_xml(_view(domain).disks, overlays))
        await ready()

        def work(domain: Any) -> Span:
            began_s = time.monotonic()
            domain.snapshotCreateXML(wanted, _SNAPSHOT_FLAGS)
            return Span(began_s, time.monotonic())

        return await self._on(uuid, work)

    async def commit_start(self, uuid: GuestUuid, target: str, base: str) -> None:
        """Start the active commit into exactly ``base``: with none named, libvirt merges into the lowest image."""
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
        await self._on(uuid, lambda domain: domain.blockCommit(target, base, None, 0, flags))

    async def commit_pivot(self, uuid: GuestUuid, target: str) -> None:
        """Finish a ready commit: the guest writes to the base again."""
        flags = libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT
        await self._on(uuid, lambda domain: domain.blockJobAbort(target, flags))

    async def pull_start(self, uuid: GuestUuid, target: str) -> None:
        """Let QEMU copy what lies below a disk's image into it; it ends by itself."""
        await self._on(uuid, lambda domain: domain.blockPull(target, 0, 0))

    async def pull_stop(self, uuid: GuestUuid, target: str) -> None:
        """Give that up; what was copied stays."""
        await self._on(uuid, lambda domain: domain.blockJobAbort(target, 0))

    async def redefine_source(self, uuid: GuestUuid, target: str, layer_path: str, layer_format: str) -> None:
        """Point the persistent definition of a shut-off guest's disk at an image."""

        def work(connection: Any) -> None:
            flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
            root = domain_xml.parse(connection.lookupByUUIDString(uuid).XMLDesc(flags))
            block_device = Path(layer_path).is_block_device()
            layer = Layer(layer_path, layer_format)
            connection.defineXML(domain_xml.with_source(root, target, layer, block_device=block_device))

        await self.connection.call(work)

    # -- the guest itself -------------------------------------------------------------------------

    async def freeze(self, uuid: GuestUuid, timeout_s: float) -> int:
        """Freeze file systems through the agent, and return how many were.

        The agent's own time-out comes first: libvirt's default is to wait for ever. A freeze that timed out may have
        happened all the same, or may yet happen, so the caller thaws in any case but :class:`AgentMissing`.
        """

        def work(domain: Any) -> int:
            if (state := _state(domain)) is not GuestState.RUNNING:
                raise AgentMissing(f"the guest's file systems cannot be frozen: it is {state}")
            if not domain_xml.agent_connected(domain_xml.parse(domain.XMLDesc(0))):
                raise AgentMissing("the guest's file systems cannot be frozen: no guest agent is running in it")
            domain.agentSetResponseTimeout(math.ceil(timeout_s), 0)
            return int(domain.fsFreeze(None, 0))

        try:
            return await self._on(uuid, work)
        except GuestUnknown:
            raise
        except HypervisorFailed as error:
            raise AgentUnavailable(f"the guest's file systems could not be frozen: {error.message}") from error

    async def thaw(self, uuid: GuestUuid, timeout_s: float) -> None:
        """Thaw file systems; thawed ones are no error, nor is a guest without a channel to any agent."""

        def work(domain: Any) -> None:
            if domain_xml.agent_connected(domain_xml.parse(domain.XMLDesc(0))) is None:
                return
            domain.agentSetResponseTimeout(math.ceil(timeout_s), 0)
            domain.fsThaw(None, 0)

        await self._on(uuid, work)

    async def passphrase(self, secret: str) -> Passphrase | None:
        """Return a secret's value; raises :class:`Refused` where libvirt does not give it out."""
        by_usage, name = disk_encryption.secret_name(secret)

        def work(connection: Any) -> Passphrase:
            if by_usage:
                found = connection.secretLookupByUsage(libvirt.VIR_SECRET_USAGE_TYPE_VOLUME, name)
            else:
                found = connection.secretLookupByUUIDString(name)
            return Passphrase(found.value(0))

        if not secret:
            return None
        try:
            return await self.connection.call(work)
        except HypervisorFailed as error:
            hint = "it must have a value and not be private: `virsh secret-get-value` shows whether it can be had"
            raise Refused(f"libvirt does not give out the secret {name}: {error.message}", hint=hint) from error

    async def fleecer(self, uuid: GuestUuid) -> Fleecer:
        """Raise: guests of libvirt are captured by redirecting, which costs them less."""
        raise HypervisorFailed(f"guest {uuid} belongs to libvirt and is never fleeced")

    async def resume_after_error(self, uuid: GuestUuid) -> None:
        """Let a guest go on that QEMU stopped at an I/O error: it repeats what failed."""

        def work(domain: Any) -> None:
            if domain.isActive() and _qmp(domain, "query-status")["status"] == "io-error":
                domain.resume()

        await self._on(uuid, work)

    async def start(self, uuid: GuestUuid) -> None:
        """Start a guest that is shut off; one that runs is no error."""

        def work(domain: Any) -> None:
            if not domain.isActive():
                domain.create()

        await self._on(uuid, work)

    async def shutdown(self, uuid: GuestUuid, timeout_s: float) -> None:
        """Shut a guest down gracefully; raises :class:`HypervisorFailed` if it is still there at the deadline."""
        name = await self._on(uuid, lambda domain: str(domain.name()))

        def ask(domain: Any, flags: int) -> None:
            try:
                domain.shutdownFlags(flags)
            except libvirt.libvirtError:
                if domain.isActive():  # else it was off before it could be asked
                    raise

        def ask_agent(domain: Any) -> None:
            if not domain_xml.agent_connected(domain_xml.parse(domain.XMLDesc(0))):
                raise AgentUnavailable("none is running in it")
            domain.agentSetResponseTimeout(math.ceil(AGENT_ANSWER_S), 0)
            ask(domain, libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)

        async def agent() -> None:
            try:
                await self._on(uuid, ask_agent)
            except HypervisorFailed as error:
                raise AgentUnavailable(error.message) from error

        ways = Ways(
            is_active=lambda: self._on(uuid, lambda domain: bool(domain.isActive())),
            agent=agent,
            button=lambda: self._on(uuid, lambda domain: ask(domain, libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)),
            force=f"`virsh destroy {name}`",
        )
        await shut_down(name, ways, timeout_s)
