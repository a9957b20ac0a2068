"""What a domain's XML says of a disk's encryption, and what a snapshot's XML has to say of its overlay's.

https://libvirt.org/formatstorageencryption.html
"""

from __future__ import annotations

from xml.etree import ElementTree

_BY_USAGE = "usage:"


def _element(disk: ElementTree.Element) -> ElementTree.Element | None:
    """Return a disk's ``<encryption>``: below its source, or (as older libvirt wrote it) below the disk itself."""
    return next((found for at in ("source/encryption", "encryption") if (found := disk.find(at)) is not None), None)


def secret_of(disk: ElementTree.Element) -> str:
    """Return the name of the libvirt secret that opens a disk's image: its UUID, or ``usage:NAME``; empty for none."""
    encryption = _element(disk)
    secret = None if encryption is None else encryption.find("secret[@type='passphrase']")
    if secret is None:
        return ""
    return secret.get("uuid") or f"{_BY_USAGE}{secret.get('usage', '')}"


def skip_reason(disk: ElementTree.Element, image_format: str) -> str:
    """Return why an encrypted disk cannot be captured; empty if that is no reason."""
    encryption = _element(disk)
    if encryption is None or image_format not in ("qcow2", "raw"):
        return ""
    kind = encryption.get("format", "")
    if kind != "luks":
        return f"its encryption is {kind}, not LUKS"
    if image_format != "qcow2":
        # Its overlay would hide LUKS's header from the guest's point of view only: sizes would not fit.
        return "it is a raw image inside LUKS, not a qcow2 image with it"
    return "" if secret_of(disk) else "no secret is named for its encryption"


def secret_name(secret: str) -> tuple[bool, str]:
    """Return whether a secret goes by its usage, and its UUID or usage."""
    return secret.startswith(_BY_USAGE), secret.removeprefix(_BY_USAGE)


def encryption(secret: str) -> ElementTree.Element:
    """Return the ``<encryption>`` of an image that a secret opens.

    The engine is named since libvirt 9.0 does not start a guest again from a definition in which it is not.
    """
    element = ElementTree.Element("encryption", format="luks", engine="qemu")
    by_usage, name = secret_name(secret)
    ElementTree.SubElement(element, "secret", {"type": "passphrase", "usage" if by_usage else "uuid": name})
    return element
