"""Secrets come from files that only their owner may read; never from a command line or the configuration itself."""

from __future__ import annotations

from pathlib import Path

from hvsnap.errors import ConfigInvalid

SECRET_BYTES_MAX = 4096


def read_secret(path: str, key: str) -> str:
    """Return the first line of a file that only its owner may read. ``key`` names it in errors."""
    file = Path(path)
    try:
        if file.stat().st_mode & 0o077:
            raise ConfigInvalid(f"{key}: {path} can be read by others", hint=f"chmod 600 {path}")
        with file.open("rb") as opened:
            text = opened.read(SECRET_BYTES_MAX).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{key}: {path} cannot be read: {error}", hint="check the path and permissions") from error
    lines = text.splitlines()
    if not lines or not lines[0].strip():
        raise ConfigInvalid(f"{key}: {path} is empty", hint="the secret stands in its first line")
    return lines[0].strip()
