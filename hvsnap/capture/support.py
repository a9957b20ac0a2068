"""Which images can be captured in which way: pure rules, whose table is docs/support.md (a test compares the two).

What a disk is skipped for, whatever its image is (a CD-ROM, a shared disk), the hypervisor's view says; what QEMU
cannot do with a disk (an iothread and fleece), its adapter does.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvsnap.capture.facts import Mode
from hvsnap.errors import Refused


@dataclass(frozen=True, slots=True)
class ImageTraits:
    """What of an image decides whether it can be captured.

    ``encrypted``: qcow2 with LUKS inside; ``encrypted_below``: an image of its backing chain is. ``secret``: the
    hypervisor names what opens it.
    """

    encrypted: bool = False
    encrypted_below: bool = False
    secret: bool = False


@dataclass(frozen=True, slots=True)
class Way:
    """How a disk is captured: the mode, and whether its guest is a bare one."""

    mode: Mode
    bare: bool


def refusal(where: str, way: Way, image: ImageTraits, *, sealed: bool) -> Refused | None:
    """Return why an image is not captured; None if it is. ``sealed``: the store is encrypted."""
    if image.encrypted_below:
        hint = "copy the disk into an image of its own: `qemu-img convert`"
        return Refused(f"{where} is on an encrypted backing file, whose key is not asked for", hint=hint)
    if not image.encrypted:
        return None
    if not sealed:
        hint = "its data would be stored in plain: configure an encrypted store"
        return Refused(f"{where} is encrypted, and the store has no key", hint=hint)
    if way.bare:
        hint = "encrypt in the guest instead, or run it under libvirt, which keeps the image's secret"
        return Refused(f"{where} is encrypted, and nobody keeps the keys of bare guests", hint=hint)
    if not image.secret:
        hint = "libvirt opens the image by a secret: name it in <encryption>, as `virsh edit` lets you"
        return Refused(f"{where} is encrypted, and the guest's definition names no secret for it", hint=hint)
    return None
