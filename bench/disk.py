"""The disk that is measured: an ext4 file system full of the host's own files, made once and kept.

Random bytes would flatter nobody's compression and zeroes everybody's; programs, libraries, documents and
translations are what disks of guests really hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOTS = ("/usr/share", "/usr/bin", "/usr/sbin", "/usr/include", "/usr/lib")
"""Where files are taken from, in this order, until there are enough."""

RECIPE = "1"


@dataclass(frozen=True)
class BenchDisk:
    """A qcow2 image. ``file_bytes`` in ``files`` files; ``data_bytes`` is what a copy of the disk has to carry."""

    path: Path
    size_bytes: int
    files: int
    file_bytes: int
    data_bytes: int


def cache() -> Path:
    """Return where what takes long to make is kept."""
    default = Path(__file__).parent.parent / ".cache" / "bench"
    return Path(os.environ.get("HVSNAP_BENCH_CACHE", default))


def build(
    size_bytes: int, wanted_bytes: int, extra: str = "", add: Callable[[Path], None] = lambda _tree: None
) -> BenchDisk:
    """Return the disk of ``wanted_bytes`` of files, building it if the cache has none.

    ``add`` puts more into its tree, ``extra`` names that.
    """
    key = hashlib.sha256(f"{RECIPE} {size_bytes} {wanted_bytes}{extra}".encode()).hexdigest()[:12]
    final = cache() / key
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix="build-") as work:
            _build(Path(work), size_bytes, wanted_bytes, add)
            (Path(work) / "made").rename(final)
    about = json.loads((final / "about.json").read_text())
    return BenchDisk(path=final / "disk.qcow2", **about)


def _build(work: Path, size_bytes: int, wanted_bytes: int, add: Callable[[Path], None]) -> None:
    made, tree, raw = work / "made", work / "tree", work / "disk.raw"
    made.mkdir()
    files = file_bytes = 0
    for source in _files(wanted_bytes):
        target = tree / str(source).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)  # nothing is written through it, and it saves a copy
        except OSError:
            shutil.copy2(source, target)
        files += 1
        file_bytes += source.stat().st_size
    add(tree)
    with raw.open("wb") as out:
        out.truncate(size_bytes)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", str(tree), str(raw)], check=True)
    disk = made / "disk.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(disk)], check=True)
    about = {
        "size_bytes": size_bytes,
        "files": files,
        "file_bytes": file_bytes,
        "data_bytes": data_bytes(disk, "qcow2"),
    }
    (made / "about.json").write_text(json.dumps(about))


def _files(wanted_bytes: int) -> Iterator[Path]:
    """Yield regular files, always in the same order, until they have ``wanted_bytes`` together."""
    taken = 0
    for root in ROOTS:
        for directory, names, leaves in os.walk(root):
            names.sort()
            for leaf in sorted(leaves):
                path = Path(directory, leaf)
                seen = path.lstat()
                if not stat.S_ISREG(seen.st_mode):
                    continue
                if taken >= wanted_bytes:
                    return
                taken += seen.st_size
                yield path
    if taken < wanted_bytes * 0.9:
        raise RuntimeError(f"{', '.join(ROOTS)} hold only {taken} bytes of files, {wanted_bytes} are wanted")


def data_bytes(path: Path, image_format: str) -> int:
    """Return how many bytes of an image are data, as qemu-img sees it."""
    command = ["qemu-img", "map", "-U", "--output=json", "-f", image_format, str(path)]
    extents = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return sum(extent["length"] for extent in extents if extent["data"] and not extent["zero"])
