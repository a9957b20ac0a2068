"""Compressed qcow2 images: written through QEMU's own filter, a whole cluster at a time.

zlib, which every QEMU reads; zstd would need one of 5.1 or later that was built with it.
"""

from __future__ import annotations

import json

from hvsnap.hypervisor.tools import run

CLUSTER_BYTES = 65536
FILTER = "compress"
"""The format that :func:`filtered` names are opened with."""


def rounded(size_bytes: int) -> int:
    """Return the size that an image must have while it is written: the filter takes whole clusters only."""
    return -(-size_bytes // CLUSTER_BYTES) * CLUSTER_BYTES


def filtered(path: str) -> str:
    """Return the name under which QEMU's tools compress what they write to a qcow2 image."""
    image = {"driver": "qcow2", "file": {"driver": "file", "filename": path}}
    return "json:" + json.dumps({"driver": FILTER, "file": image})


async def cut(path: str, size_bytes: int) -> None:
    """Give an image that was written at a rounded size the size that its disk has."""
    await run("qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", path, str(size_bytes))
