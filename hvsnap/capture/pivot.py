"""Whether a pivot that was asked for has happened, when nobody was there to see it.

Before the pivot the overlay is the newest, after it the image is, and each is wrong in the other's place. The proof
must hold whatever died in between, also when it died hours later.
"""

from __future__ import annotations

import asyncio

from hvsnap.capture.facts import CapturedDisk
from hvsnap.errors import HypervisorFailed
from hvsnap.hypervisor import images
from hvsnap.model import GuestView
from hvsnap.secret import Passphrase

OPEN_MARKER = "hvsnap-open"
"""A disabled bitmap in the overlays of libvirt's guests. QEMU marks it in use while the overlay is open for writing,
and clears that when it closes it: so a clean marker after a crash in which the pivot had been asked for shows that the
pivot happened.

Overlays of bare guests hold no bitmap: QEMU closes them by itself at the pivot, and 7.2 crashes when it is asked about
its nodes just then, since it reads their bitmaps for the answer (measured: ``qcow2_get_bitmap_info_list`` on a freed
image). They have lazy reference counts, whose dirty flag says the same."""

CERTAIN_S = 60.0
"""An image that was written to this long after its overlay was closed took the guest's writes. A guest that is shut
down before its pivot closes both, the overlay first; that takes milliseconds, and seconds with a slow disk."""


async def pivot_proved(disk: CapturedDisk, guest: GuestView | None, asked: str, *, on_base: bool) -> bool:
    """Whether the overlay of a pivot that was asked for was left behind by it.

    ``on_base``: the guest is on the image, as far as its hypervisor knows; ``asked`` names the QEMU that was asked to
    pivot. Raises :class:`HypervisorFailed` where it cannot be told, and being wrong would lose data.
    """
    if guest is None or guest.instance is None:
        # By libvirt's own word, which goes with the pivot.
        return on_base or await _closed_before_the_image(disk, bare=False)
    if guest.active:
        # Another QEMU may be on the image only because its launcher knows of no overlay.
        return on_base and asked == guest.instance != ""
    return await _image_is_newer(disk)


async def create_overlay(disk: CapturedDisk, block_size: int, *, bare: bool, key: Passphrase | None) -> None:
    """Create the overlay of a disk, in the form from which it can be told later whether it was closed in good order."""
    await images.create_overlay(disk.overlay, disk.base, disk.base_format, lazy=bare, key=key)
    if not bare:
        await images.bitmap_add(disk.overlay, OPEN_MARKER, block_size, disabled=True, key=key)


async def _closed_in_order(disk: CapturedDisk, *, bare: bool) -> bool:
    """Whether QEMU closed the overlay in good order: at the pivot, or as the guest was shut down."""
    overlay = await images.image_info(disk.overlay, "qcow2")
    if bare:
        return not overlay.dirty
    marker = overlay.bitmap(OPEN_MARKER)
    return marker is not None and not marker.inconsistent


async def _closed_before_the_image(disk: CapturedDisk, *, bare: bool) -> bool:
    """Whether the overlay was closed in good order, and the image was not.

    A guest that is shut down cleanly before its pivot closes the overlay in good order, too; but it closes the image
    below likewise, while a guest that dies after the pivot leaves the image's bitmaps in use.
    """
    if not await _closed_in_order(disk, bare=bare):
        return False
    base = await images.image_info(disk.base, disk.base_format)
    return any(bitmap.inconsistent for bitmap in base.bitmaps)


async def _image_is_newer(disk: CapturedDisk) -> bool:
    """Whether the image was written to after the overlay was closed; that alone tells where no definition does.

    An image that was not has the overlay's content or an older one, so that merging the overlay again does no harm.
    """
    if not await _closed_in_order(disk, bare=True):
        return False
    if await _closed_before_the_image(disk, bare=True):
        return True
    written, closed = await asyncio.gather(
        asyncio.to_thread(images.written_at, disk.base), asyncio.to_thread(images.written_at, disk.overlay)
    )
    if written is not None and closed is not None:
        if written <= closed:
            return False
        if written > closed + CERTAIN_S:
            return True
    if await images.same_content(disk.base, disk.base_format, disk.overlay):
        return True
    raise HypervisorFailed(
        f"it cannot be told whether {disk.overlay} or {disk.base} is the newer one of disk {disk.target}: both were "
        "closed at about the same time, and they differ",
        hint="look at both. If it is the image, remove the overlay; if it is the overlay, run "
        f"`qemu-img commit -b {disk.base} {disk.overlay}` and remove it; then `hvsnap recover`",
    )
