"""Files in a snapshot. The daemon knows nothing of them: the command line answers, as it reads them."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from hvsnap.wire.base import Answer

FileKind = Literal["file", "directory", "symlink", "block device", "character device", "fifo", "socket", "unknown"]


class FileSystem(Answer):
    """A file system, swap space or the like on a disk, as the guest wrote it."""

    device: str = Field(examples=["/dev/sda1", "/dev/vg0/root"])
    type: str = Field(examples=["ext4", "xfs", "ntfs", "swap", "crypto_LUKS", "unknown"])
    label: str
    uuid: str
    size_bytes: int
    system: str = Field(description="the operating system whose root it is; empty: none was recognised")
    mounted_at: list[str] = Field(description="where that system, or another one on the disk, mounts it")
    encrypted: bool = Field(description="by the guest, which alone has the key")


class FileSystemList(Answer):
    """What a snapshot's disk holds."""

    snapshot: str
    filesystems: list[FileSystem]


class GuestFile(Answer):
    """A file in a snapshot. What cannot be told is null: the bytes of its name are no UTF-8."""

    path: str = Field(description="bytes that are no UTF-8 are shown as \\\\xff")
    kind: FileKind
    mode: int | None = Field(description="permission bits, set-user-id and the like included")
    uid: int | None
    gid: int | None
    size_bytes: int | None
    modified_at: AwareDatetime | None
    target: str = Field(description="where a symbolic link points to")


class FileList(Answer):
    """What lies in a directory of a snapshot; with --recursive also in those below it, one after the other."""

    snapshot: str
    filesystem: str = Field(description="the device that the path begins at")
    path: str
    files: list[GuestFile]


class FileSkipped(Answer):
    """A file that was not copied: a device, or a fifo."""

    path: str
    kind: FileKind


class FilesCopied(Answer):
    """What was copied out of a snapshot."""

    snapshot: str
    filesystem: str
    targets: list[str] = Field(description="where it is now: one for each source")
    files: int
    directories: int
    symlinks: int
    copied_bytes: int
    left_out: int = Field(description="how many devices and fifos were not copied")
    skipped: list[FileSkipped] = Field(description="the first thousand of them")
    disarmed: int = Field(description="files whose set-user-id and set-group-id bits were not kept")
