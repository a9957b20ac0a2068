"""qemu-nbd as a separate process on a private Unix socket: how images are opened, for reading or restoring."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import AsyncIterator

from hvsnap.errors import HypervisorFailed
from hvsnap.hypervisor.image_key import handed_over, named
from hvsnap.hypervisor.tools import bound_to_us, end, failure
from hvsnap.ports import NbdExport
from hvsnap.secret import Passphrase

START_TIMEOUT_S = 30.0
"""qemu-nbd is up in ~20 ms; opening a qcow2 with large bitmaps from a slow disk takes seconds."""

POLL_S = 0.002

SECTOR_BYTES_MAX = 4096
"""Direct I/O must end at a sector of the device: QEMU would lengthen a raw image that ends within one."""


def listens(path: str) -> bool:
    """Whether somebody accepts connections: the socket's file is there a moment before its listener."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex(path) == 0


async def _wait_listening(process: asyncio.subprocess.Process, argv: list[str], path: str) -> None:
    async with asyncio.timeout(START_TIMEOUT_S):
        while not listens(path):
            if process.returncode is not None:
                stderr = await process.stderr.read() if process.stderr else b""
                raise failure(argv, process.returncode, stderr)
            await asyncio.sleep(POLL_S)


def _takes_direct(path: str, image_format: str) -> bool:
    """Whether an image can be written by direct I/O: its file system knows it, its end suits any device's sectors.

    What is restored is written once and not read again: past the page cache that costs half (docs/performance.md),
    and drives nothing out of it that guests use. Blocking.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:  # EINVAL; what else is wrong with the image, qemu-nbd says in its own words
        return False
    try:
        return image_format != "raw" or os.lseek(descriptor, 0, os.SEEK_END) % SECTOR_BYTES_MAX == 0
    finally:
        os.close(descriptor)


@contextlib.asynccontextmanager
async def serve_image(
    path: str,
    image_format: str,
    *,
    run_dir: str,
    read_only: bool = True,
    bitmap: str | None = None,
    connections: int = 8,
    idle_priority: bool = False,
    key: Passphrase | None = None,
) -> AsyncIterator[NbdExport]:
    """Serve one image on a private socket below ``run_dir`` for as long as the context lasts.

    The process takes the image's lock: a guest cannot open for writing what is restored here. It dies with
    the daemon. ``idle_priority`` lets everybody else's I/O and work go first; ``key`` opens an encrypted image.
    Raises :class:`HypervisorFailed`, also for a bitmap that is missing or inconsistent.
    """
    path_of_socket = os.path.join(run_dir, f"nbd-{secrets.token_hex(6)}.sock")
    argv = ["qemu-nbd", "--persistent", "--shared", str(connections), "--socket", path_of_socket]
    how, image = named(path, image_format, key)
    argv += how
    if read_only:
        argv += ["--read-only"]
    else:
        # Zero writes must reach qcow2 as zero clusters; without discard they would be allocated and filled.
        cache = "none" if await asyncio.to_thread(_takes_direct, path, image_format) else "writeback"
        argv += ["--discard", "unmap", "--cache", cache]
    argv += [] if bitmap is None else ["--bitmap", bitmap]
    first = ["nice", "-n", "10", "ionice", "-c", "3"] if idle_priority else []
    with handed_over(key) as (secret, inherited):
        process = await asyncio.create_subprocess_exec(
            *bound_to_us([*first, *argv, *secret, image]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=inherited,
        )
    try:
        try:
            await _wait_listening(process, argv, path_of_socket)
        except TimeoutError as error:
            raise HypervisorFailed(f"qemu-nbd did not open {path} within {START_TIMEOUT_S:.0f} s") from error
        yield NbdExport(path_of_socket, bitmap)
    finally:
        await asyncio.shield(end(process))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path_of_socket)
