"""Images written through the real qemu-nbd hold what was written, whatever their format and length."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hvsnap.hypervisor import images
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.hypervisor.tools import run
from hvsnap.restore.writer import open_writer

KIB = 1024


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("size_bytes", [1024 * KIB, 1024 * KIB + 512])
async def test_image_holds_what_was_written_up_to_its_last_byte(
    workdir: Path, image_format: str, size_bytes: int
) -> None:
    path = workdir / "image"
    await images.create_image(str(path), image_format, size_bytes)
    expected = random.Random(1).randbytes(size_bytes)
    serving = serve_image(str(path), image_format, run_dir=str(workdir), read_only=False)
    async with serving as export, open_writer(export) as writer:
        await writer.zero(0, 64 * KIB)
        for offset in range(64 * KIB, size_bytes, 64 * KIB):
            await writer.write(offset, memoryview(expected)[offset : offset + 64 * KIB])
        await writer.finish()
    expected = bytes(64 * KIB) + expected[64 * KIB :]
    flat = workdir / "flat"
    await run("qemu-img", "convert", "-f", image_format, "-O", "raw", str(path), str(flat))
    assert flat.read_bytes() == expected
    assert (await images.image_info(str(path), image_format)).size_bytes == size_bytes
