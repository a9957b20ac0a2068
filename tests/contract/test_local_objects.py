"""What the local directory promises beyond the contract: durability, privacy, and failing well. Faults are injected."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from hvsnap.errors import NoSpace, NotFound, StoreFailed
from hvsnap.store import files
from hvsnap.store.direct import BUFFER_BYTES
from hvsnap.store.objects import RESERVE, LocalObjects
from hvsnap.store.s3 import Place, S3Objects
from tests.store_kit import skip_unless_root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def small_device(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    skip_unless_root()
    path = tmp_path / "device"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def leftovers(root: Path) -> list[str]:
    """Return all files but the reserve."""
    files = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    return sorted(set(files) - {RESERVE})


async def test_a_full_device_leaves_nothing_and_works_again_with_space(small_device: Path) -> None:
    """FAULTS 10."""
    objects = LocalObjects(small_device)
    await objects.put("ballast", bytes(600_000))
    with pytest.raises(NoSpace) as caught:
        await objects.put("packs/00/x", bytes(600_000))
    assert caught.value.hint
    assert leftovers(small_device) == ["ballast"]
    await objects.delete("ballast")
    await objects.put("packs/00/x", bytes(600_000))
    assert await objects.get("packs/00/x") == bytes(600_000)


async def test_a_device_too_full_for_what_is_on_its_way_into_a_bucket_is_named(small_device: Path) -> None:
    """FAULTS 10."""
    objects = S3Objects(Place("bucket", ""), small_device, store=MemoryStore())
    writer = await objects.writer("manifests/large")
    with pytest.raises(StoreFailed, match="No space") as caught:
        await writer.write(*[bytes(4 << 20)] * 8)
    assert str(small_device) in caught.value.hint
    await writer.abort()
    assert list(small_device.iterdir()) == []
    with pytest.raises(NotFound):
        await objects.size("manifests/large")


@pytest.mark.parametrize("failing", range(8))
async def test_a_failed_fsync_is_final_for_that_object(
    root: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Each fsync on an object's way fails once, and succeeds when it is tried again. FAULTS 11."""
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    objects = LocalObjects(root)
    monkeypatch.setattr(files.os, "fsync", fsync)
    writer = await objects.writer("packs/00/x")
    failed = False
    for step in (lambda: writer.write(b"1"), writer.commit):
        try:
            await step()
        except StoreFailed:
            failed = True
        else:
            assert not failed, "a step after the failed one succeeded"
    if failed:
        with pytest.raises(StoreFailed):
            await writer.commit()
        assert leftovers(root) == []
        await objects.put("packs/00/x", b"2")
        assert await objects.get("packs/00/x") == b"2"
    else:
        assert calls <= failing, "a failed fsync went unnoticed"
        assert await objects.get("packs/00/x") == b"1"


async def test_every_name_on_the_way_is_made_durable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced before it gets its name, the directories after they or their entries appeared."""
    steps: list[tuple[str, str]] = []
    real_fsync, real_link, real_mkdir = os.fsync, os.link, Path.mkdir

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        steps.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def link(source: Path, target: Path) -> None:
        real_link(source, target)
        steps.append(("link", str(target)))

    def mkdir(self: Path, mode: int = 0o777) -> None:
        real_mkdir(self, mode)
        steps.append(("mkdir", str(self)))

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "link", link)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    await LocalObjects(root).put("packs/00/x", b"1")

    for made in (root, root / "packs", root / "packs/00"):
        at = steps.index(("mkdir", str(made)))
        assert ("fsync", str(made.parent)) in steps[at + 1 :]
    linked = steps.index(("link", str(root / "packs/00/x")))
    assert any(step == "fsync" and f"{root}/.tmp/" in path for step, path in steps[:linked])
    assert ("fsync", str(root / "packs/00")) in steps[linked + 1 :]


async def test_a_directory_that_another_thread_just_made_is_synced_too(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await LocalObjects(root).put("packs/00/x", b"1")
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(files.os, "fsync", fsync)
    await LocalObjects(root).put("packs/00/y", b"1")
    assert {str(root.parent), str(root), str(root / "packs"), str(root / "packs/00")} <= set(synced)


async def test_interrupted_writers_leave_only_temporaries_that_the_next_start_removes(root: Path) -> None:
    objects = LocalObjects(root)
    await objects.put("a/x", b"1")
    for name in ("a/y", "b/z"):
        await (await objects.writer(name)).write(b"half")
    assert await LocalObjects(root).clean_temporaries() == 2
    assert leftovers(root) == ["a/x"]
    assert await LocalObjects(root / "never").clean_temporaries() == 0


async def test_a_cancelled_write_has_ended_before_its_file_is_thrown_away(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the thread would write into whatever file got the same descriptor next."""
    started, go_on, order = threading.Event(), threading.Event(), []
    real_write, real_close = os.write, os.close

    def write(descriptor: int, data: memoryview) -> int:
        started.set()
        assert go_on.wait(10)
        order.append("written")
        return real_write(descriptor, data)

    def close(descriptor: int) -> None:
        order.append("closed")
        real_close(descriptor)

    objects = LocalObjects(root)
    writer = await objects.writer("x")
    await objects.put("first", b"1")  # the directories are there
    monkeypatch.setattr(files.os, "write", write)
    monkeypatch.setattr(files.os, "close", close)
    task = asyncio.create_task(writer.write(bytes(BUFFER_BYTES)))
    await asyncio.to_thread(started.wait, 10)
    task.cancel()
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    await writer.abort()
    assert order[0] == "written"
    assert "closed" in order
    assert leftovers(root) == ["first"]


async def test_disks_contents_are_for_their_owner_only(root: Path) -> None:
    await LocalObjects(root).put("packs/00/x", b"1")
    for path in [root, *root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


async def test_a_store_whose_disk_is_not_mounted_is_not_created_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(StoreFailed) as caught:
        await LocalObjects(tmp_path / "not-mounted" / "store").put("x", b"1")
    assert not isinstance(caught.value, NotFound)
    assert "mount" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
async def test_a_directory_that_cannot_be_written_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Root may write anywhere, so the refusal is injected."""

    def refuse(*_args: object) -> int:
        raise OSError(code, os.strerror(code))

    objects = LocalObjects(root)
    await objects.put("first", b"1")
    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(StoreFailed) as caught:
        await objects.put("x", b"1")
    assert str(root) in caught.value.message
    assert "write" in caught.value.hint
