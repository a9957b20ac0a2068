"""The file systems of a disk, and what lies in them, as libguestfs' machine sees them.

What it answers comes from a guest and is not to be trusted: names are only shown and compared here, never opened.
"""

from __future__ import annotations

import contextlib
import posixpath
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hvsnap.errors import BadRequest, Failed, HvsnapError, NotFound, Refused

NO_FILES = {"unknown", "swap", "LVM2_member", "linux_raid_member"}
ENCRYPTED = {"crypto_LUKS", "BitLocker"}
KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFBLK: "block device",
    stat.S_IFCHR: "character device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}

Entry = dict[str, Any]
"""A file, in the form of :class:`hvsnap.wire.GuestFile`."""


class GuestFiles:
    """A disk's file systems. ``guest`` is a handle of libguestfs; ``scratch`` a directory for what it hands over."""

    def __init__(self, guest: Any, scratch: Path) -> None:
        self.guest = guest
        self._scratch = scratch
        # The disk does not change, and each costs seconds without KVM.
        self._known_kinds: dict[str, str] | None = None
        self._known_roots: list[str] | None = None

    # -- file systems -----------------------------------------------------------------------------

    def filesystems(self) -> list[dict[str, Any]]:
        """Return all of them in the form of :class:`hvsnap.wire.FileSystem`, where systems mount them included."""
        places: dict[str, list[str]] = {}
        systems: dict[str, str] = {}
        for root in self._roots():
            systems[root] = self.guest.inspect_get_product_name(root)
            for place, device in self.guest.inspect_get_mountpoints(root).items():
                places.setdefault(device, []).append(place)
        return [
            {
                "device": device,
                "type": kind,
                "label": self._quietly(self.guest.vfs_label, device) if kind not in NO_FILES else "",
                "uuid": self._quietly(self.guest.vfs_uuid, device) if kind != "unknown" else "",
                "size_bytes": self.guest.blockdev_getsize64(self.guest.mountable_device(device)),
                "system": systems.get(device, ""),
                "mounted_at": sorted(places.get(device, [])),
                "encrypted": kind in ENCRYPTED,
            }
            for device, kind in sorted(self._kinds().items())
        ]

    def open(self, wanted: str = "") -> str:
        """Mount what is wanted, or else the only file system, or else the only system's; return the root's device.

        Raises what :func:`choose` raises, and :class:`BadRequest` where no system tells which file systems are meant.
        """
        kinds = self._kinds()
        device = choose(kinds, wanted)
        self.guest.umount_all()
        if device:
            self._mount(device, "/")
            return device
        roots = self._roots()
        if len(roots) != 1:
            what = f"{len(roots)} operating systems" if roots else "several file systems"
            raise BadRequest(f"it holds {what}", hint=_hint(_choices(kinds)))
        self._mount_system(roots[0])
        return roots[0]

    def _roots(self) -> list[str]:
        """Return the root devices of all operating systems."""
        if self._known_roots is None:
            self._known_roots = self.guest.inspect_os()
        return self._known_roots

    def _kinds(self) -> dict[str, str]:
        """Return the types of all file systems by their devices."""
        if self._known_kinds is None:
            self._known_kinds = self._look_for_kinds()
        return self._known_kinds

    def _look_for_kinds(self) -> dict[str, str]:
        """Ask for them; libguestfs does not list what is encrypted."""
        kinds: dict[str, str] = self.guest.list_filesystems()
        parts = set(self.guest.list_partitions())
        whole = {self.guest.part_to_dev(part) for part in parts}
        for device in sorted((parts | set(self.guest.list_devices()) | set(self.guest.lvs())) - whole - set(kinds)):
            kind = self._quietly(self.guest.vfs_type, device)
            if kind in ENCRYPTED:
                kinds[device] = kind
        return kinds

    def _mount_system(self, root: str) -> None:
        """Mount what a system mounts, as far as it is there; without its root it is an error."""
        places = self.guest.inspect_get_mountpoints(root)
        for place in sorted(places, key=len):
            if place == "/":
                self._mount(places[place], place)
            else:
                with contextlib.suppress(RuntimeError):
                    self.guest.mount_ro(places[place], place)

    def _mount(self, device: str, place: str) -> None:
        try:
            self.guest.mount_ro(device, place)
        except RuntimeError as error:
            hint = "it may be damaged, or of a kind that the kernel of this host does not know"
            raise Failed(f"{device} cannot be mounted: {error}", hint=hint) from error

    def _quietly(self, ask: Any, device: str) -> str:
        with contextlib.suppress(RuntimeError, UnicodeDecodeError):
            return str(ask(device))
        return ""

    # -- files ------------------------------------------------------------------------------------

    def kind(self, path: str) -> str:
        """Return what lies at a path, a symbolic link not being followed: a kind of :data:`KINDS`."""
        return KINDS.get(stat.S_IFMT(self._stat(path)["st_mode"]), "unknown")

    def real(self, path: str) -> str:
        """Return where the symbolic links of a path lead, within the guest."""
        with _told(path):
            return str(self.guest.realpath(path))

    def listing(self, path: str, *, recursive: bool = False) -> Iterator[list[Entry]]:
        """Yield what lies in a directory, and, if wanted, in those below it: one list for each. Of a file: itself."""
        entry = self._entry(path.rstrip("/") or "/", self._stat(path))
        with _told(path):
            is_directory = self.guest.is_dir(path, followsymlinks=True)
        if not is_directory:
            if entry["kind"] == "symlink":
                with contextlib.suppress(RuntimeError, UnicodeDecodeError):
                    entry["target"] = self.guest.readlink(path)
            yield [entry]
            return
        waiting = [path.rstrip("/") or "/"]
        while waiting:
            entries = self._in_directory(waiting.pop())
            yield entries
            if recursive:
                below = [one["path"] for one in entries if one["kind"] == "directory"]
                waiting.extend(reversed(below))

    def _stat(self, path: str) -> dict[str, int]:
        with _told(path):
            found: dict[str, int] = self.guest.lstatns(path)
        return found

    def _in_directory(self, directory: str) -> list[Entry]:
        listed = self._scratch / "names"
        with _told(directory):
            self.guest.ls0(directory, str(listed))
        raw = sorted(name for name in listed.read_bytes().split(b"\0") if name)
        # The binding speaks UTF-8 alone: of other names nothing but themselves can be told.
        names = [name.decode() for name in raw if _is_text(name)]
        with _told(directory):
            found = dict(zip(names, self.guest.lstatnslist(directory, names), strict=True))
        targets = self._targets(directory, [name for name in names if stat.S_ISLNK(found[name]["st_mode"])])
        entries = []
        for name in raw:
            shown, known = name.decode(errors="backslashreplace"), _is_text(name)
            entry = self._entry(posixpath.join(directory, shown), found.get(shown) if known else None)
            entry["target"] = targets.get(shown, "") if known else ""
            entries.append(entry)
        return entries

    def _targets(self, directory: str, links: list[str]) -> dict[str, str]:
        """Return where symbolic links point to."""
        if not links:
            return {}
        try:
            return dict(zip(links, self.guest.readlinklist(directory, links), strict=True))
        except UnicodeDecodeError:  # one of them: the others are asked for one by one
            targets = {}
            for link in links:
                with contextlib.suppress(UnicodeDecodeError):
                    targets[link] = self.guest.readlink(posixpath.join(directory, link))
            return targets

    def _entry(self, path: str, found: dict[str, int] | None) -> Entry:
        known = found if found is not None and found["st_ino"] != -1 else None
        entry: Entry = {"path": path, "kind": "unknown", "target": ""}
        if known is None:
            return entry | dict.fromkeys(("mode", "uid", "gid", "size_bytes", "modified_at"))
        return entry | {
            "kind": KINDS.get(stat.S_IFMT(known["st_mode"]), "unknown"),
            "mode": stat.S_IMODE(known["st_mode"]),
            "uid": known["st_uid"],
            "gid": known["st_gid"],
            "size_bytes": known["st_size"],
            "modified_at": _time(known["st_mtime_sec"], known["st_mtime_nsec"]),
        }


def _time(seconds: int, nanoseconds: int) -> str | None:
    """Return a time of a file; None for one that no calendar has: a guest may write anything there."""
    try:
        return (
            datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds, microseconds=nanoseconds // 1000)
        ).isoformat()
    except OverflowError:
        return None


def _is_text(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def choose(kinds: dict[str, str], wanted: str) -> str:
    """Return the file system that is wanted, or the only one; empty where an operating system has to tell.

    ``kinds`` are the types of all by their devices. Raises :class:`NotFound`, :class:`BadRequest` and :class:`Refused`.
    """
    choices = _choices(kinds)
    locked = sorted(device for device, kind in kinds.items() if kind in ENCRYPTED)
    if wanted in choices or (not wanted and len(choices) > 1):
        return wanted
    if not wanted and choices:
        return choices[0]
    if wanted in locked or (not wanted and locked):
        device = wanted or locked[0]
        hint = "make a disk of it (`hvsnap disk-create`), attach that to a guest, and open it there"
        why = f"was encrypted by the guest ({kinds[device]}), and only the guest has the key"
        raise Refused(f"{device} {why}", hint=hint)
    if not wanted:
        raise Refused(
            "the snapshot holds no file system that can be read", hint="`hvsnap snapshot-serve` shows the bare disk"
        )
    if wanted in kinds:
        raise BadRequest(f"{wanted} holds no files ({kinds[wanted]})", hint=_hint(choices))
    raise NotFound(f"there is no file system {wanted} in it", hint=_hint(choices))


def _choices(kinds: dict[str, str]) -> list[str]:
    return sorted(device for device, kind in kinds.items() if kind not in NO_FILES | ENCRYPTED)


def _hint(choices: list[str]) -> str:
    if not choices:
        return "it holds none that can be read"
    return "choose one: " + ", ".join(f"--filesystem {device}" for device in choices)


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """Raise what libguestfs says of a path as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        raise trouble(path, error) from error


def trouble(path: str, error: RuntimeError) -> HvsnapError:
    """Return an error of ours for what libguestfs says of a path."""
    text = str(error)
    if "No such file or directory" in text:
        return NotFound(f"there is no {path} in it", hint="`hvsnap snapshot-ls ID:/` shows what there is")
    if "Not a directory" in text or "Too many levels of symbolic links" in text or "File name too long" in text:
        return BadRequest(f"{path} leads nowhere: {text.rpartition(': ')[2]}", hint="check the path")
    if "Input/output error" in text:
        hint = "its file system may be damaged, or what is stored of it: `hvsnap snapshot-verify ID` tells"
        return Failed(f"{path} cannot be read: input/output error", hint=hint)
    return Failed(f"{path} cannot be read: {text}", hint="`hvsnap snapshot-serve` shows the bare disk")
