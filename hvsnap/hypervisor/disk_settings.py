"""How a definition of libvirt's wants a guest's disks driven; pure functions on its XML.

https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms, ``<driver>``
"""

from __future__ import annotations

from dataclasses import dataclass

from hvsnap.hypervisor import domain_xml


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """One disk's. Empty: the definition says nothing, and QEMU's default holds."""

    target: str
    path: str
    format: str
    cache: str
    discard: str


def disk_settings(xml: str) -> list[DiskSettings]:
    """Return those of the disks; drives for media have none. Raises :class:`HypervisorFailed` for malformed XML."""
    found = []
    for element in domain_xml.parse(xml).findall("devices/disk"):
        driver, target, source = element.find("driver"), element.find("target"), element.find("source")
        if element.get("device", "disk") != "disk" or target is None or source is None:
            continue
        says = {} if driver is None else driver.attrib
        found.append(
            DiskSettings(
                target=target.get("dev", ""),
                path=source.get("file") or source.get("dev") or "",
                format=says.get("type", ""),
                cache=says.get("cache", ""),
                discard=says.get("discard", ""),
            )
        )
    return found
