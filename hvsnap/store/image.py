"""An image's object: its name, and what it is an image of (docs/format.md, "Image"). Pure: bytes in, values out."""

from __future__ import annotations

import json
import re
from typing import Any

from blake3 import blake3

from hvsnap.errors import Damaged, FormatUnknown
from hvsnap.model import Image, ImageId, SnapshotId
from hvsnap.store.repository import Repository

IMAGES = "images"
IMAGE_BYTES_MAX = 64 * 1024

_FORMAT, _VERSION = "hvsnap-image", 1
_NAME = re.compile(IMAGES + r"/([a-z0-9-]{1,64})")
_KIND = b"image"
_TYPES: dict[str, type] = {"id": str, "name": str, "description": str, "snapshot": str, "created_at": float}


def object_name(image: ImageId) -> str:
    """Return the name of an image's object."""
    return f"{IMAGES}/{image}"


def image_of(name: str) -> ImageId | None:
    """Return the image whose object has this name; None for an object that is none of ours."""
    match = _NAME.fullmatch(name)
    return None if match is None else ImageId(match[1])


def encode(image: Image, repository: Repository) -> bytes:
    """Return an image's object; in an encrypted repository what it says is sealed."""
    document: dict[str, Any] = {name: getattr(image, name) for name in _TYPES}
    values: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "repository": repository.id.hex()}
    if repository.seal is None:
        values["image"] = document
    else:
        name = object_name(image.id).encode()
        values["sealed"] = repository.seal.seal(_KIND, name, json.dumps(document).encode()).hex()
    values["check"] = _check(values, repository)
    return (json.dumps(values, indent=2) + "\n").encode()


def decode(data: bytes, name: str, repository: Repository) -> Image:
    """Return what an object says. Raises :class:`Damaged`, :class:`FormatUnknown`."""
    try:
        values = json.loads(data) if len(data) <= IMAGE_BYTES_MAX else None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise Damaged(f"{name} is not the object of an image")
    if values.get("version") != _VERSION:
        raise FormatUnknown(f"{name} has format version {values.get('version')}, this release knows {_VERSION}")
    if values.pop("check", None) != _check(values, repository):
        raise Damaged(f"{name} was changed: its check value is wrong")
    if values.get("repository") != repository.id.hex():
        raise Damaged(f"{name} belongs to another repository")
    document = _opened(values, name, repository)
    wrong = [key for key, kind in _TYPES.items() if not isinstance(document.get(key), kind)]
    if wrong or object_name(ImageId(document["id"])) != name:
        raise Damaged(f"{name} does not say what image it is: {', '.join(wrong) or 'its id is another one'}")
    known = {key: document[key] for key in _TYPES}
    return Image(**known | {"id": ImageId(document["id"]), "snapshot": SnapshotId(document["snapshot"])})


def _opened(values: dict[str, Any], name: str, repository: Repository) -> dict[str, Any]:
    """Return the document; one that is sealed in a plain repository, or the other way round, is refused."""
    document = values.get("image")
    if repository.seal is not None:
        sealed = values.get("sealed")
        if not isinstance(sealed, str) or document is not None:
            raise Damaged(f"{name} is not sealed")
        try:
            document = json.loads(repository.seal.open(_KIND, name.encode(), bytes.fromhex(sealed), name))
        except ValueError as error:
            raise Damaged(f"{name} is not hexadecimal, or holds no JSON") from error
    if not isinstance(document, dict):
        raise Damaged(f"{name} does not say what image it is")
    return document


def _check(values: dict[str, Any], repository: Repository) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return blake3(text.encode(), key=repository.keys.image).hexdigest()
