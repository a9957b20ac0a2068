"""Which kind of object a name is of (docs/format.md): what is of none is somebody else's, and left alone."""

from __future__ import annotations

import contextlib
import re

from hvsnap.errors import Damaged
from hvsnap.store.identity import ManifestName
from hvsnap.store.image import image_of
from hvsnap.store.pack import is_pack
from hvsnap.store.repository import CONFIG_NAME

_NUMBERED = re.compile(r"keys/[0-9]{4}|settings/[0-9]{8}|lease/[0-9]{12}")


def is_ours(name: str) -> bool:
    """Whether an object of this name can be one of a repository's."""
    if name == CONFIG_NAME or is_pack(name) or image_of(name) is not None or _NUMBERED.fullmatch(name):
        return True
    with contextlib.suppress(Damaged):
        ManifestName.parse(name)
        return True
    return False
