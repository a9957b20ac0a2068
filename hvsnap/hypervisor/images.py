"""Disk images outside a running guest: what qemu-img tells and does.

The format is always named, for an image and for its backing file: a guest can write a qcow2 header into
its raw disk, and a tool that probed it would open any file of the host that the header names.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvsnap.errors import HypervisorFailed, Refused, TargetExists
from hvsnap.hypervisor.image_key import CREATE_OPTIONS, named
from hvsnap.hypervisor.tools import run
from hvsnap.model import Bitmap
from hvsnap.secret import Passphrase

OVERLAY_OPTIONS = "extended_l2=on,cluster_size=128k"
"""Sub-clusters of 4 KiB: a guest's small write into the overlay copies nothing from the image below.
With plain 64 KiB clusters the guest lost 20 % of its random writes while a snapshot was open
(docs/performance.md)."""

KEY_MS = 100
"""How long opening an encrypted overlay takes QEMU: it derives the key while the guest stands still. The image itself
has seconds of that (qemu-img's default is 2), but is opened before its guest runs."""

_CLOCK_FAILED = "Unable to get accurate CPU usage"
"""QEMU 7.2 measures how fast keys are derived here, and gives up where the kernel's clock has not moved meanwhile."""

CREATIONS_MAX = 10


RECONNECT_S = 60
"""How long QEMU waits for an NBD server that has gone away, before the guest sees an error."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What qemu-img says of one image. ``bitmaps`` are those stored in the image.

    ``holds_bitmaps`` says whether the image's format can store persistent bitmaps at all.
    """

    path: str
    format: str
    size_bytes: int
    bitmaps: tuple[Bitmap, ...]
    backing_path: str | None
    backing_format: str | None
    encrypted: bool
    holds_bitmaps: bool
    dirty: bool = False
    """Written to and not closed in good order; only images made with lazy reference counts say so."""
    data_file: bool = False
    """The guest's data is in a file of its own, beside the image (qcow2's ``data_file``)."""

    def bitmap(self, name: str) -> Bitmap | None:
        """Return the bitmap of that name."""
        return next((b for b in self.bitmaps if b.name == name), None)


def _bitmap(raw: dict[str, Any]) -> Bitmap:
    """Translate qemu-img's flags: ``auto`` = recording, ``in-use`` = not closed cleanly."""
    flags = raw["flags"]
    return Bitmap(
        name=raw["name"],
        granularity=raw["granularity"],
        recording="auto" in flags,
        persistent=True,
        inconsistent="in-use" in flags,
    )


async def image_info(path: str, image_format: str) -> ImageInfo:
    """Return what an image is, without taking its lock (``-U``: a running guest may hold it).

    While a guest has the image open for writing, all its bitmaps read as inconsistent.
    """
    out = await run("qemu-img", "info", "-U", "--output=json", "-f", image_format, path)
    raw = json.loads(out)
    specific = raw.get("format-specific", {}).get("data", {})
    return ImageInfo(
        path=path,
        format=raw["format"],
        size_bytes=raw["virtual-size"],
        bitmaps=tuple(_bitmap(b) for b in specific.get("bitmaps", [])),
        backing_path=raw.get("full-backing-filename") or raw.get("backing-filename"),
        backing_format=raw.get("backing-filename-format"),
        encrypted=bool(raw.get("encrypted")),
        # Version 2 of qcow2 ("compat 0.10") has no extensions, and so no bitmaps.
        holds_bitmaps=raw["format"] == "qcow2" and specific.get("compat") != "0.10",
        dirty=bool(raw.get("dirty-flag")),
        data_file="data-file" in specific,
    )


async def encrypted_below(info: ImageInfo) -> bool:
    """Whether an image of the backing chain is encrypted; one that cannot be looked at is not, as far as is known."""
    seen = {info.path}
    while info.backing_path is not None and info.backing_format is not None and info.backing_path not in seen:
        seen.add(info.backing_path)
        try:
            info = await image_info(info.backing_path, info.backing_format)
        except HypervisorFailed:
            return False
        if info.encrypted:
            return True
    return False


def _create_empty(path: str, like: str | None) -> None:
    """Create an empty file exclusively, with the owner and mode of ``like`` (so that QEMU may open it)."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError as error:
        raise TargetExists(f"{path} exists") from error
    except OSError as error:
        raise HypervisorFailed(f"cannot create {path}: {error.strerror}") from error
    try:
        if like is not None:
            seen = os.stat(like)
            os.fchown(fd, seen.st_uid, seen.st_gid)
            os.fchmod(fd, seen.st_mode & 0o777)
    finally:
        os.close(fd)


def exists(path: str) -> bool:
    """Whether a file or device is there (a stat: call it in a thread)."""
    return os.path.exists(path)


async def remove(path: str) -> None:
    """Remove an image of ours; one that is gone already is no error."""
    await asyncio.to_thread(Path(path).unlink, missing_ok=True)


async def create_overlay(
    path: str, base_path: str, base_format: str, *, lazy: bool = False, key: Passphrase | None = None
) -> None:
    """Create an empty overlay over ``base_path``, owned like it; raises :class:`TargetExists`.

    With ``lazy`` reference counts it says of itself whether it was closed in good order (:attr:`ImageInfo.dirty`).
    With a ``key``, which opens the base, it is encrypted as well. Nothing is left behind when it fails.
    """
    await asyncio.to_thread(_create_empty, path, base_path)
    try:
        features = f"{OVERLAY_OPTIONS},lazy_refcounts=on" if lazy else OVERLAY_OPTIONS
        on_base = ("-b", base_path, "-F", base_format)
        if key is None:
            await run("qemu-img", "create", "-q", "-f", "qcow2", "-o", features, *on_base, path)
        else:
            size = str((await image_info(base_path, base_format)).size_bytes)
            options = f"{features},{CREATE_OPTIONS},encrypt.iter-time={KEY_MS}"
            # Unsafe (-u) is only that the base is not opened: it is there, and its size is known.
            await _create_encrypted("-f", "qcow2", "-o", options, "-u", *on_base, path, size, key=key)
    except BaseException:
        await asyncio.shield(remove(path))
        raise


async def _create_encrypted(*arguments: str, key: Passphrase) -> None:
    """Create an encrypted image, again where QEMU's clock has failed it."""
    for left in reversed(range(CREATIONS_MAX)):
        try:
            await run("qemu-img", "create", "-q", *arguments, key=key)
            return
        except HypervisorFailed as error:
            if left == 0 or _CLOCK_FAILED not in error.message:
                raise


async def create_image(
    path: str, image_format: str, size_bytes: int, *, like: str | None = None, key: Passphrase | None = None
) -> None:
    """Create a new sparse image, owned like another one if that is named; raises :class:`TargetExists`.

    With a ``key`` it is an encrypted qcow2. Nothing is left behind when it fails.
    """
    await asyncio.to_thread(_create_empty, path, like)
    try:
        if key is None:
            await run("qemu-img", "create", "-q", "-f", image_format, path, str(size_bytes))
        else:
            options = f"{CREATE_OPTIONS},encrypt.iter-time={KEY_MS}"
            await _create_encrypted("-f", image_format, "-o", options, path, str(size_bytes), key=key)
    except BaseException:
        await asyncio.shield(remove(path))
        raise


async def format_device(path: str, image_format: str, size_bytes: int) -> None:
    """Write an empty image onto a block device, over whatever is there."""
    await run("qemu-img", "create", "-q", "-f", image_format, path, str(size_bytes))


async def check_image(path: str, *, key: Passphrase | None = None) -> None:
    """Let QEMU check the tables of a qcow2 image that nobody writes to; raises :class:`HypervisorFailed`."""
    how, image = named(path, "qcow2", key)
    await run("qemu-img", "check", "-q", *how, image, key=key)


async def largest_size(image_format: str, size_bytes: int) -> int:
    """Return how many bytes an image of a disk takes once all of the disk was written to."""
    out = await run("qemu-img", "measure", "--output=json", "-O", image_format, "--size", str(size_bytes))
    return int(json.loads(out)["fully-allocated"])


async def create_over_nbd(path: str, socket: str, size_bytes: int) -> None:
    """Create an empty qcow2 overlay over what is served at a Unix socket; nothing is left behind when it fails.

    Its QEMU comes back to a server that has to be started again.
    """
    server = {"type": "unix", "path": socket}
    backing = {"driver": "raw", "file": {"driver": "nbd", "server": server, "reconnect-delay": RECONNECT_S}}
    await asyncio.to_thread(_create_empty, path, None)
    try:
        below = ("-b", f"json:{json.dumps(backing)}", "-F", "raw")
        await run("qemu-img", "create", "-q", "-f", "qcow2", *below, path, str(size_bytes))
    except BaseException:
        await asyncio.shield(remove(path))
        raise


async def copy_whole(path: str, target: str) -> None:
    """Copy a qcow2 overlay, with all that it has below it, into a new, empty qcow2 image of its size.

    The overlay's lock is not taken: whoever writes to it meanwhile makes the copy worthless, and is not disturbed.
    """
    to_new = ("-n", "--target-is-zero", "-W", "-O", "qcow2")
    await run("qemu-img", "convert", "-U", "-f", "qcow2", *to_new, path, target)


async def check_no_snapshots(path: str) -> None:
    """Raise :class:`Refused` for a qcow2 image with snapshots inside: they would lose what lies below the image."""
    raw = json.loads(await run("qemu-img", "info", "-U", "--output=json", "-f", "qcow2", path))
    if raw.get("snapshots"):
        hint = "delete them: virsh snapshot-delete, or with the guest off qemu-img snapshot -d NAME IMAGE"
        raise Refused(f"{path} holds snapshots of its own, which need what lies below it", hint=hint)


async def bitmap_add(
    path: str, name: str, granularity: int, *, disabled: bool = False, key: Passphrase | None = None
) -> None:  # fmt: skip
    """Add a persistent bitmap to a qcow2 image that nobody writes to; it records unless ``disabled``."""
    state = "--disable" if disabled else "--enable"
    how, image = named(path, "qcow2", key)
    await run("qemu-img", "bitmap", *how, "--add", state, "-g", str(granularity), image, name, key=key)


async def bitmap_remove(path: str, name: str, *, key: Passphrase | None = None) -> None:
    """Remove a bitmap, also an inconsistent one, from a qcow2 image that nobody writes to."""
    how, image = named(path, "qcow2", key)
    await run("qemu-img", "bitmap", *how, "--remove", image, name, key=key)


async def commit_overlay(overlay: str, base: str, *, key: Passphrase | None = None) -> None:
    """Write an overlay's content down into exactly ``base`` while the guest is off.

    May be repeated after a crash: until the overlay is removed it holds all newer data. Recording bitmaps
    of the base see these writes. ``-d`` keeps the overlay's content, so that it stays the truth until then.
    """
    how, image = named(overlay, "qcow2", key, below=True)
    into = ["-b", base]
    if key is not None:
        # A backing file that a key opens has no name to be found by; with none named, it is the one right below.
        below = (await image_info(overlay, "qcow2")).backing_path
        if below != base:
            raise HypervisorFailed(f"{overlay} lies over {below}, not over {base}")
        into = []
    await run("qemu-img", "commit", "-q", "-d", *how, *into, image, key=key)


async def sync_image(path: str) -> None:
    """Write an image's dirty pages out from outside, without stopping the guest.

    Cuts the stall of the guest at the switch from ~80 ms to ~5 ms with a dirty page cache, since QEMU
    flushes there anyway while the guest waits.
    """

    def sync() -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)

    await asyncio.to_thread(sync)


async def is_empty(path: str, *, key: Passphrase | None = None) -> bool:
    """Whether nothing was ever written into a qcow2 overlay: no cluster of its own is allocated."""
    how, image = named(path, "qcow2", key, below=True)
    out = await run("qemu-img", "map", "-U", "--output=json", *how, image, key=key)
    return not any(extent["depth"] == 0 and extent.get("present", True) for extent in json.loads(out))


def written_at(path: str) -> float | None:
    """Return when a file was last written to; None for a block device, of which nobody keeps that. Blocking."""
    seen = os.stat(path)
    return None if stat.S_ISBLK(seen.st_mode) else seen.st_mtime


async def same_content(path: str, image_format: str, overlay: str) -> bool:
    """Whether an image and a qcow2 overlay over it read the same; nobody may be writing to either."""
    try:
        await run("qemu-img", "compare", "-U", "-q", "-f", image_format, "-F", "qcow2", path, overlay)
    except HypervisorFailed:
        return False
    return True
