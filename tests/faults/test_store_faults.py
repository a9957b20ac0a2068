"""The store when its process is killed, its device is full, or its device is far too slow."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvsnap.errors import NoSpace
from hvsnap.model import BlockPlace
from hvsnap.store.blocks import PackedBlocks, open_store
from hvsnap.store.objects import RESERVE, LocalObjects
from tests.faults import store_writer
from tests.store_kit import BLOCK, MemoryIndex, a_block, ids_of, read_back, seeded, skip_unless_root

ROOT = Path(__file__).parents[2]


def writer(root: Path, seed: int, mib: int) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "tests.faults.store_writer", str(root), str(seed), str(mib)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT)


async def stored_blocks(store: PackedBlocks, index: MemoryIndex) -> int:
    """Enter every visible pack into the index, as a rebuild does, read every block; return how many there are."""
    async for item in store.packs.list():
        entries = await store.packs.index(item.name)
        first = await index.next_block_id()
        await index.add_pack(
            item.name,
            item.size_bytes,
            [
                BlockPlace(
                    first + n, bytes(e["digest"]), item.name, int(e["offset"]), int(e["length"]), int(e["flags"])
                )
                for n, e in enumerate(entries)
            ],
        )
    ids = list(index.blocks)
    for start in range(0, len(ids), 1024):
        await read_back(store, ids[start : start + 1024])
    return len(ids)


@pytest.mark.parametrize("attempt", range(4))
async def test_a_killed_writer_leaves_whole_packs_with_all_that_was_flushed(tmp_path: Path, attempt: int) -> None:
    """FAULTS 1."""
    rng = seeded()
    process = writer(tmp_path / "store", rng.randrange(2**16), 1000)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(attempt + 1)]
    await asyncio.sleep(rng.random() * 0.2)
    process.kill()
    lines += process.stdout.read().splitlines(keepends=True)
    assert process.wait() == -9
    flushed = int([line for line in lines if line.endswith("\n")][-1])

    objects = LocalObjects(tmp_path / "store")
    index = MemoryIndex()
    store = await open_store(objects, index, create=False)
    assert await stored_blocks(store, index) >= flushed > 0
    await objects.clean_temporaries()
    files = {str(p.relative_to(tmp_path / "store")) for p in (tmp_path / "store").rglob("*") if p.is_file()}
    assert files - {RESERVE} == {item.name async for item in objects.list("")} == {"hvsnap.json", *index.packs}
    await store.close()
    store = await open_store(objects, index, create=False)  # with ids behind those that were entered
    session = store.session()
    await session.put(memoryview(a_block(rng, "noise")))
    await session.flush()
    await store.close()


def test_memory_is_bounded_however_much_is_stored(tmp_path: Path) -> None:
    """A capture may use 200 MiB in all; the store's part, with two packs on their way and 16 puts waiting, is half."""
    process = writer(tmp_path / "store", 1, 1026)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    puts_mib = store_writer.FLUSH_CHUNKS * store_writer.CHUNK >> 20
    assert int(out.split()[-1]) < 100 + puts_mib


@pytest.fixture
def small_device(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    skip_unless_root()
    path = tmp_path / "device"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("free_kib", [0, 4, 64, 128, 400, 1500, 5000])
async def test_a_device_full_at_any_point_fails_cleanly_and_works_again(small_device: Path, free_kib: int) -> None:
    """FAULTS 10."""
    rng = seeded()
    objects, index = LocalObjects(small_device), MemoryIndex()
    store = await open_store(objects, index)
    early = store.session()
    kept = [a_block(rng, "noise") for _ in range(4)]
    ids = ids_of((await early.put(memoryview(b"".join(kept)))).ids)
    await early.flush()
    free = subprocess.run(["df", "--output=avail", "-k", str(small_device)], capture_output=True, check=True)
    (small_device / "ballast").write_bytes(bytes((int(free.stdout.split()[-1]) - free_kib) * 1024))

    session = store.session()

    async def capture() -> None:
        await asyncio.gather(*(session.put(memoryview(rng.randbytes(BLOCK * 16))) for _ in range(8)))
        await session.flush()

    with pytest.raises(NoSpace):
        await capture()
    with pytest.raises(NoSpace):
        await session.flush()
    assert len(index.packs) == 1
    assert await read_back(store, ids) == b"".join(kept)

    (small_device / "ballast").unlink()
    later = store.session()
    stored = await later.put(memoryview(data := rng.randbytes(BLOCK * 16)))
    await later.flush()
    assert await read_back(store, ids_of(stored.ids)) == data
    assert not list((small_device / ".tmp").iterdir())
    await store.close()
