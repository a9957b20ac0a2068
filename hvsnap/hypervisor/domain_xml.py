"""What libvirt's domain XML says of a guest and its disks; pure functions on text.

https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree

from hvsnap.errors import BadRequest, HypervisorFailed
from hvsnap.hypervisor import disk_encryption
from hvsnap.model import DiskView, GuestState, GuestUuid, GuestView, Layer

BUSES = ("virtio", "scsi")
FORMATS = ("qcow2", "raw")


def parse(xml: str) -> ElementTree.Element:
    """Parse domain XML. libvirt writes no document type; one with entities is not libvirt's, and is refused."""
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise HypervisorFailed("the guest's XML declares entities", hint="libvirt writes none: check who made it")
    try:
        return ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise HypervisorFailed(f"the guest's XML is malformed: {error}") from error


def _source_path(source: ElementTree.Element | None) -> str:
    return "" if source is None else source.get("file") or source.get("dev") or ""


def _layers(disk: ElementTree.Element) -> tuple[Layer, ...]:
    """Return the backing chain that the XML shows, the active image first; empty for an empty drive."""
    layers = []
    element: ElementTree.Element | None = disk
    while element is not None:
        path = _source_path(element.find("source"))
        kind = element.find("driver" if element is disk else "format")
        if not path:
            break
        layers.append(Layer(path, "raw" if kind is None else kind.get("type", "raw")))
        element = element.find("backingStore")
    return tuple(layers)


def _skip_reason(disk: ElementTree.Element, layers: tuple[Layer, ...]) -> str:
    """Return why a disk cannot be captured; empty if it can."""
    device = disk.get("device", "disk")
    target = disk.find("target")
    bus = "" if target is None else target.get("bus", "")
    if device != "disk":
        return f"it is a {device}"
    if disk.get("type", "file") not in ("file", "block"):
        return f"its source is of type {disk.get('type')}, not a file or block device"
    if not layers:
        return "the drive is empty"
    if bus not in BUSES:
        return f"its bus is {bus}, not virtio or scsi"
    for flag, reason in (
        ("readonly", "read-only"),
        ("shareable", "shared with other guests"),
        ("transient", "transient"),
    ):
        if disk.find(flag) is not None:
            return f"it is {reason}"
    if layers[0].format not in FORMATS:
        return f"its format is {layers[0].format}, not qcow2 or raw"
    return disk_encryption.skip_reason(disk, layers[0].format)


def _boot_order(disk: ElementTree.Element) -> int:
    boot = disk.find("boot")
    return 1 << 30 if boot is None else int(boot.get("order", "0"))


def _disk(element: ElementTree.Element, *, system: bool) -> DiskView:
    target = element.find("target")
    driver = element.find("driver")
    layers = _layers(element)
    return DiskView(
        target="" if target is None else target.get("dev", ""),
        bus="" if target is None else target.get("bus", ""),
        serial=element.findtext("serial") or "",
        layers=layers,
        system=system,
        skip_reason=_skip_reason(element, layers),
        iothread=driver is not None and driver.get("iothread") is not None,
        secret=disk_encryption.secret_of(element),
    )


def guest_view(
    root: ElementTree.Element, state: GuestState, *, persistent: bool, saved: bool = False, autostart: bool = False
) -> GuestView:
    """Return the guest that a domain's XML describes.

    The system disk is the disk with the lowest boot order; where no disk has one, the first that can be captured.
    """
    elements = root.findall("devices/disk")
    eligible = [e for e in elements if not _skip_reason(e, _layers(e))]
    system = min(eligible, key=_boot_order, default=None)
    return GuestView(
        uuid=GuestUuid(root.findtext("uuid") or ""),
        name=root.findtext("name") or "",
        state=state,
        persistent=persistent,
        autostart=autostart,
        disks=tuple(_disk(e, system=e is system) for e in elements),
        saved=saved,
    )


def find_disk(root: ElementTree.Element, target: str) -> ElementTree.Element:
    """Return the ``<disk>`` element of a target; raises :class:`HypervisorFailed` when it is gone."""
    for element in root.findall("devices/disk"):
        found = element.find("target")
        if found is not None and found.get("dev") == target:
            return element
    raise HypervisorFailed(f"disk {target} is no longer attached to the guest")


@dataclass(frozen=True, slots=True)
class MirrorState:
    """The block job that libvirt shows on a disk in its XML."""

    job: str
    ready: bool


def mirror_state(disk: ElementTree.Element) -> MirrorState | None:
    """Return the job of a disk's ``<mirror>`` element: the one place where libvirt says that it is ready."""
    mirror = disk.find("mirror")
    if mirror is None:
        return None
    return MirrorState(mirror.get("job", ""), mirror.get("ready") == "yes")


def alias(disk: ElementTree.Element) -> str:
    """Return the device alias of a running guest's disk, which is also its name in QEMU."""
    element = disk.find("alias")
    if element is None:
        raise HypervisorFailed("the disk has no alias: the guest is not running")
    return element.get("name", "")


def with_source(root: ElementTree.Element, target: str, layer: Layer, *, block_device: bool) -> str:
    """Return the domain's XML with a disk pointed at another image, a file or a block device; the rest as it was.

    The backing chain's record goes, too: libvirt reads the image's own when the guest starts.
    """
    disk = find_disk(root, target)
    source = disk.find("source")
    driver = disk.find("driver")
    if source is None or driver is None:
        raise HypervisorFailed(f"disk {target} has no source to change")
    # A guest whose block device is defined as a file does not start.
    disk.set("type", "block" if block_device else "file")
    for name in ("file", "dev"):
        source.attrib.pop(name, None)
    source.set("dev" if block_device else "file", layer.path)
    driver.set("type", layer.format)
    backing = disk.find("backingStore")
    if backing is not None:
        disk.remove(backing)
    return ElementTree.tostring(root, encoding="unicode")


def agent_connected(root: ElementTree.Element) -> bool | None:
    """Whether an agent in the running guest has opened its end of the channel; None: there is no such channel."""
    targets = root.findall("devices/channel/target[@name='org.qemu.guest_agent.0']")
    return any(target.get("state") == "connected" for target in targets) if targets else None


def snapshot_xml(all_disks: Iterable[DiskView], overlays: dict[str, str]) -> str:
    """Return the XML of a disk-only snapshot into prepared overlays; every other disk is named as left out.

    An encrypted disk's overlay is opened by the disk's own secret.
    """
    root = ElementTree.Element("domainsnapshot")
    disks = ElementTree.SubElement(root, "disks")
    for view in all_disks:
        overlay = overlays.get(view.target)
        if overlay is None:
            ElementTree.SubElement(disks, "disk", name=view.target, snapshot="no")
            continue
        disk = ElementTree.SubElement(disks, "disk", name=view.target, snapshot="external", type="file")
        ElementTree.SubElement(disk, "driver", type="qcow2")
        source = ElementTree.SubElement(disk, "source", file=overlay)
        if view.secret:
            source.append(disk_encryption.encryption(view.secret))
    return ElementTree.tostring(root, encoding="unicode")


# -- new disks ------------------------------------------------------------------------------------

_BUS_OF = {"vd": "virtio", "sd": "scsi"}


def bus_of(target: str) -> str:
    """Return the bus that a target's name stands for; raises :class:`BadRequest`."""
    if not re.fullmatch(r"(vd|sd)[a-z]{1,3}", target):
        hint = "vdb and the like are virtio disks, sdb and the like SCSI disks"
        raise BadRequest(f"{target[:64]!a} is no target of a disk", hint=hint)
    return _BUS_OF[target[:2]]


def targets(root: ElementTree.Element) -> list[tuple[str, str]]:
    """Return the target and the topmost image of each disk that a domain's XML shows; drives of all kinds are told."""
    elements = root.findall("devices/disk")
    return [(_disk(one, system=False).target, _source_path(one.find("source"))) for one in elements]


def disk_xml(target: str, layer: Layer, *, block_device: bool) -> str:
    """Return the XML of a disk to be attached. It passes on what the guest discards (SERVICE 9.4)."""
    disk = ElementTree.Element("disk", type="block" if block_device else "file", device="disk")
    ElementTree.SubElement(disk, "driver", name="qemu", type=layer.format, discard="unmap")
    ElementTree.SubElement(disk, "source", {"dev" if block_device else "file": layer.path})
    ElementTree.SubElement(disk, "target", dev=target, bus=bus_of(target))
    return ElementTree.tostring(disk, encoding="unicode")


def volume_xml(name: str, image_format: str, size_bytes: int) -> str:
    """Return the XML of an empty volume that takes no space yet."""
    volume = ElementTree.Element("volume")
    ElementTree.SubElement(volume, "name").text = name
    ElementTree.SubElement(volume, "capacity", unit="bytes").text = str(size_bytes)
    ElementTree.SubElement(volume, "allocation").text = "0"
    ElementTree.SubElement(ElementTree.SubElement(volume, "target"), "format", type=image_format)
    return ElementTree.tostring(volume, encoding="unicode")


def pool_place(root: ElementTree.Element) -> tuple[str, str]:
    """Return the type of a storage pool, and the directory of its volumes."""
    return root.get("type", ""), root.findtext("target/path") or ""
