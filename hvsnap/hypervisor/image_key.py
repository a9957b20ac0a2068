"""Opening encrypted images with QEMU's tools: which image by which key, and the key without a trace of it.

A key is on no command line, in no environment and in no file: the tool reads it from memory that only it and the
daemon have, and that is gone with them, whatever dies.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from hvsnap.secret import Passphrase

_ID = "hvsnap-key"
"""The key's name among the tool's objects."""

CREATE_OPTIONS = f"encrypt.format=luks,encrypt.key-secret={_ID}"
"""Options of a new qcow2 image that the key is to open."""


@contextlib.contextmanager
def handed_over(key: Passphrase | None) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Give a tool's arguments for a key, and the descriptors that it must inherit: none for no key."""
    if key is None:
        yield [], ()
        return
    descriptor = os.memfd_create(_ID, os.MFD_CLOEXEC)
    try:
        os.write(descriptor, key.value)
        yield ["--object", f"secret,id={_ID},file=/dev/fd/{descriptor}"], (descriptor,)
    finally:
        os.close(descriptor)


def named(path: str, image_format: str, key: Passphrase | None, *, below: bool = False) -> tuple[list[str], str]:
    """Return the arguments that say how an image is opened, and its name, as the tool wants both.

    With ``below`` the key opens its backing file, too.
    """
    if key is None:
        return ["-f", image_format], path
    options = f"driver={image_format},file.filename={path.replace(',', ',,')},encrypt.key-secret={_ID}"
    return ["--image-opts"], options + (f",backing.encrypt.key-secret={_ID}" if below else "")
