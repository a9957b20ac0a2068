"""Frozen disks read through the real qemu-nbd: at the pace that is given, and after everybody else."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hvsnap.capture.plan import Group, group_blocks
from hvsnap.capture.reader import NICE, read_chunks
from hvsnap.capture.space import SpaceLimits, room
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.hypervisor.tools import run

BLOCK = 65536
BLOCKS = 3 * group_blocks(BLOCK) + 1


class Pace:
    """Gives out so many groups, and notes who asks."""

    def __init__(self, groups: int) -> None:
        self.lengths: list[int] = []
        self.nice: set[int] = set()
        self._groups = groups
        self._lock = threading.Lock()

    def wait(self, length: int, stop: threading.Event) -> bool:
        with self._lock:
            self.nice.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            if len(self.lengths) < self._groups:
                self.lengths.append(length)
                return True
        return not stop.wait(60)


def work() -> Iterator[Group]:
    for first in range(0, BLOCKS, group_blocks(BLOCK)):
        yield Group(0, np.arange(first, min(BLOCKS, first + group_blocks(BLOCK)), dtype=np.uint16))


def pids_with(word: str) -> list[str]:
    """Return the processes whose command line holds a word."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # gone by now
            if entry.name.isdigit() and word.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
    return found


async def test_readers_ask_for_every_group_are_nice_and_stop_while_they_wait(workdir: Path) -> None:
    path = workdir / "image"
    content = random.Random(2).randbytes(BLOCKS * BLOCK)
    path.write_bytes(content)
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    async with serve_image(str(path), "raw", run_dir=str(workdir), idle_priority=True) as export:
        (server,) = pids_with(export.socket)
        assert os.getpriority(os.PRIO_PROCESS, int(server)) >= NICE
        assert (await run("ionice", "-p", server)).strip() == b"idle"
        pace, found = Pace(groups=99), bytearray(len(content))
        async with read_chunks(export, len(content), BLOCK, work(), pace) as stream:
            while (chunk := await stream.get()) is not None:
                first = int(chunk.index[0]) * BLOCK
                found[first : first + len(chunk.data)] = chunk.data
                chunk.release()
        assert found == content
        assert sorted(pace.lengths) == sorted(group.index.size * BLOCK for group in work())
        assert pace.nice == {NICE}
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
        pace = Pace(groups=1)
        async with read_chunks(export, len(content), BLOCK, work(), pace) as stream:
            first_chunk = await stream.get()
            assert first_chunk is not None  # the others wait; leaving ends them at once
    assert len(pace.lengths) == 1


def test_room_is_what_the_guest_may_still_write(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    slack = 512 << 20  # others write to this device, too
    assert abs(room([str(overlay)], SpaceLimits(1 << 20, 0)) - (free - (1 << 20))) < slack
    assert room([str(overlay)], SpaceLimits(0, 1 << 20)) == 1 << 20
    overlay.write_bytes(bytes(range(256)) * 1024)
    used = overlay.stat().st_blocks * 512
    assert room([str(overlay)], SpaceLimits(0, 1 << 20)) == (1 << 20) - used
    other = str(tmp_path / "other")
    assert room([str(overlay), other], SpaceLimits(0, 1 << 20)) == (1 << 20) - used
