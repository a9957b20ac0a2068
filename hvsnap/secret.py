"""Secrets come from files that only their owner may read; never from a command line or the configuration itself."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field

from hvsnap.errors import ConfigInvalid

SECRET_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class Passphrase:
    """What opens an encrypted image. It is in no text that is made of it, so that no log and no error can show it."""

    value: bytes = field(repr=False)


def read_secret(path: str, key: str) -> str:
    """Return the first line of a file that only its owner may read. ``key`` names it in errors.

    Raises :class:`ConfigInvalid`. Blocks no longer than the file system does.
    """
    try:
        lines = read_private(path, key).decode().splitlines()
    except UnicodeDecodeError as error:
        raise ConfigInvalid(f"{key}: {path} is not UTF-8 text", hint="the secret stands in its first line") from error
    if not lines or not lines[0].strip():
        raise ConfigInvalid(f"{key}: {path} is empty", hint="the secret stands in its first line")
    return lines[0].strip()


def read_private(path: str, key: str, bytes_max: int = SECRET_BYTES_MAX) -> bytes:
    """Return the first ``bytes_max`` bytes of a file that only its owner may read. Raises :class:`ConfigInvalid`."""
    try:
        # Without waiting: the other end of a FIFO may never come.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as opened:
            # What was opened is judged, not what the name leads to a moment earlier or later.
            _check_private(path, key, os.fstat(opened.fileno()))
            return opened.read(bytes_max)
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigInvalid(f"{key}: {path} cannot be read: {why}", hint="check the path and permissions") from error


def _check_private(path: str, key: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigInvalid(f"{key}: {path} is not a regular file")
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigInvalid(f"{key}: {path} is open to others (mode {mode:04o})", hint=f"chmod 600 {path}")
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigInvalid(f"{key}: {path} belongs to another user ({found.st_uid})", hint=f"chown root {path}")
