"""What libvirt tells of its host that no guest shows: as whom guests run, what confines them, others' checkpoints."""

from __future__ import annotations

import contextlib
from typing import Any
from xml.etree import ElementTree

import libvirt

from hvsnap.model import GuestUuid, Traits


def traits(connection: Any) -> Traits:
    """Look. Blocking; raises libvirt's error where it does not answer at all."""
    labels = {}
    root = ElementTree.fromstring(connection.getCapabilities())
    for model in root.findall("host/secmodel"):
        labels[model.findtext("model", "")] = model.findtext("baselabel", "")
    checkpoints = {}
    for domain in connection.listAllDomains():
        # A guest may be gone again, and a driver may know no checkpoints.
        with contextlib.suppress(libvirt.libvirtError):
            names = [one.getName() for one in domain.listAllCheckpoints()]
            if names:
                checkpoints[GuestUuid(domain.UUIDString())] = names
    return Traits(labels, checkpoints)
