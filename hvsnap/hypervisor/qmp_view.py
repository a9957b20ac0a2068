"""What QMP answers say of a bare guest and its disks; pure functions on answers.

A disk is called by its device's id (``-device …,id=vda``), else by the name of its drive (``-drive if=virtio`` makes
``virtio0``), else by that of its block node: names that a launcher gives, and gives again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvsnap.errors import HypervisorFailed
from hvsnap.hypervisor.qemu_nodes import Graph, filters_and_format
from hvsnap.model import DiskActivity, DiskView, GuestState, Layer

FORMATS = ("qcow2", "raw")
FILE_DRIVERS = ("file", "host_device")
_SCSI_DISKS = ("scsi-hd", "scsi-block")
_OTHER_KINDS = {"cd": "cdrom", "floppy": "floppy"}

PROPERTIES = ("type", "serial", "bootindex", "share-rw", "iothread", "iothread-vq-mapping", "parent_bus")
"""Properties of a disk's device that are asked for; a device need not have all of them."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device with a disk: its properties, and those of the controller that it is on (SCSI)."""

    path: str
    properties: Mapping[str, Any]
    controller: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answers:
    """One look at a guest: ``query-block``, ``query-named-block-nodes`` (flat), the block graph, the devices.

    ``devices`` are by QEMU's name (``qdev``); ``directory`` is QEMU's own, for paths that are relative.
    """

    block: Sequence[dict[str, Any]]
    nodes: Sequence[dict[str, Any]]
    graph: dict[str, Any]
    devices: Mapping[str, Device]
    directory: str = ""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A disk, and where it is in QEMU: ``path`` of its device, the node at its ``root``, all its ``nodes``.

    ``chain`` are the nodes that hold the formats of ``view.layers``, one for each; empty for a disk without any.
    """

    view: DiskView
    path: str
    root: str
    chain: tuple[str, ...]
    nodes: frozenset[str]

    @property
    def format_node(self) -> str:
        """The node that holds the format of the image that takes the guest's writes."""
        if not self.chain:
            raise HypervisorFailed(f"disk {self.view.target} cannot be used: {self.view.skip_reason}")
        return self.chain[0]


def qom_path(qdev: str) -> str:
    """Return the path of a device that QEMU names by its id or by its path."""
    return qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"


def guest_state(status: str, *, running: bool) -> GuestState:
    """Return the state of a guest whose QEMU exists (``query-status``)."""
    return GuestState.RUNNING if running or status == "running" else GuestState.PAUSED


def attachments(answers: Answers) -> list[Attachment]:
    """Return the disks that devices are on, in QEMU's order.

    The system disk is the one with the lowest boot index; where none has one, the first that can be captured.
    """
    found = [_attachment(entry, answers) for entry in answers.block if entry.get("qdev")]
    boot = [one for one in found if not one.view.skip_reason]
    system = min(boot, key=lambda one: _boot_index(answers, one), default=None)
    return [one if one is not system else replace(one, view=replace(one.view, system=True)) for one in found]


def activities(blockstats: Sequence[Mapping[str, Any]]) -> dict[str, DiskActivity]:
    """Return what the guest has asked of each of its disks (``query-blockstats``), by target."""
    found = {}
    for entry in blockstats:
        if entry.get("qdev"):
            stats = entry["stats"]
            found[_target({**entry, "inserted": entry})] = DiskActivity(
                reads=stats["rd_operations"],
                read_ns=stats["rd_total_time_ns"],
                writes=stats["wr_operations"],
                write_ns=stats["wr_total_time_ns"],
                flushes=stats["flush_operations"],
                flush_ns=stats["flush_total_time_ns"],
            )
    return found


def find(found: Sequence[Attachment], target: str) -> Attachment:
    """Return the disk of a target; raises :class:`HypervisorFailed` when it is gone."""
    for one in found:
        if one.view.target == target:
            return one
    raise HypervisorFailed(f"disk {target} is no longer attached to the guest")


def _boot_index(answers: Answers, one: Attachment) -> int:
    for device in answers.devices.values():
        if device.path == one.path:
            index = device.properties.get("bootindex", -1)
            return index if isinstance(index, int) and index >= 0 else 1 << 31
    return 1 << 31


def _target(entry: Mapping[str, Any]) -> str:
    parts = qom_path(entry["qdev"]).split("/")
    if len(parts) > 3 and parts[2] == "peripheral":
        return parts[3]
    if entry.get("device"):
        return str(entry["device"])
    node = str(entry.get("inserted", {}).get("node-name", ""))
    return parts[-1] if not node or node.startswith("#") else node


def _attachment(entry: dict[str, Any], answers: Answers) -> Attachment:
    device = answers.devices.get(entry["qdev"], Device(qom_path(entry["qdev"]), {}, {}))
    view = DiskView(
        target=_target(entry),
        bus=_bus(device),
        serial=str(device.properties.get("serial") or ""),
        layers=(),
        system=False,
        iothread=any(owner.get(name) for owner in (device.properties, device.controller) for name in _THREADS),
    )
    reason = _device_reason(entry, device)
    inserted = entry.get("inserted")
    if inserted is None:
        return Attachment(replace(view, skip_reason=reason or "the drive is empty"), device.path, "", (), frozenset())
    root = str(inserted["node-name"])
    try:
        path = filters_and_format(inserted, list(answers.nodes), answers.graph)
        layers, chain, nodes, below = _layers(path, answers)
    except (HypervisorFailed, KeyError) as error:
        # A name that one answer knows and another does not: the graph changed between them.
        why = error.message if isinstance(error, HypervisorFailed) else "QEMU's block graph is changing"
        return Attachment(replace(view, skip_reason=reason or why), device.path, root, (), frozenset({root}))
    reason = reason or ("it is read-only" if inserted.get("ro") else "") or _layers_reason(layers) or below
    return Attachment(replace(view, layers=layers, skip_reason=reason), device.path, root, chain, frozenset(nodes))


_THREADS = ("iothread", "iothread-vq-mapping")


def _bus(device: Device) -> str:
    kind = str(device.properties.get("type", ""))
    if kind.startswith("virtio-blk"):
        return "virtio"
    if kind.startswith("scsi-"):
        return "usb" if "usb" in str(device.controller.get("type", "")) else "scsi"
    return kind.partition("-")[0] or "unknown"


def _device_reason(entry: Mapping[str, Any], device: Device) -> str:
    """Return why a device's disk cannot be captured, whatever its image is."""
    kind = str(device.properties.get("type", ""))
    for ending, name in _OTHER_KINDS.items():
        if kind.endswith(ending):
            return f"it is a {name}"
    if "inserted" not in entry:
        return "the drive is empty"
    bus = _bus(device)
    if bus not in ("virtio", "scsi") or (bus == "scsi" and kind not in _SCSI_DISKS):
        return f"its bus is {bus}, not virtio or scsi"
    return "it is shared with other guests" if device.properties.get("share-rw") is True else ""


def _layers_reason(layers: Sequence[Layer]) -> str:
    if layers[0].format not in FORMATS:
        return f"its format is {layers[0].format}, not qcow2 or raw"
    return "" if os.path.isabs(layers[0].path) else f"the path of its image is relative: {layers[0].path}"


def _layers(path: Sequence[str], answers: Answers) -> tuple[tuple[Layer, ...], tuple[str, ...], set[str], str]:
    """Return a disk's backing chain, its format nodes, and the names of all its nodes.

    The chain ends where something lies below it that is no file (an instant disk that is not whole); the last item
    says so.
    """
    drivers = {node["node-name"]: str(node["drv"]) for node in answers.nodes}
    files = {node["node-name"]: str(node["file"]) for node in answers.nodes}
    graph = Graph(answers.graph)
    layers: list[Layer] = []
    chain: list[str] = []
    seen = set(path)
    current: str | None = path[-1]
    while current is not None:
        leaf = graph.children(current).get("file")
        while leaf is not None and drivers.get(leaf) not in FILE_DRIVERS:
            seen.add(leaf)
            leaf = graph.below(leaf)
        if leaf is None and layers:
            return tuple(layers), tuple(chain), seen, "its image lies over what is not a file or block device"
        if leaf is None:
            raise HypervisorFailed("its source is not a file or block device")
        seen |= {current, leaf}
        chain.append(current)
        layers.append(Layer(_absolute(files[leaf], answers.directory), drivers[current]))
        below = graph.children(current).get("backing")
        while below is not None and drivers[below] not in ("qcow2", "raw", "luks"):
            seen.add(below)
            below = graph.below(below)
        if below in seen:
            raise HypervisorFailed("QEMU's block graph has a loop")
        current = below
    return tuple(layers), tuple(chain), seen, ""


def _absolute(path: str, directory: str) -> str:
    return path if os.path.isabs(path) or not directory else os.path.normpath(os.path.join(directory, path))
