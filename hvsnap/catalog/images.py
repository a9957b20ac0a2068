"""Images in the catalog, and which of their objects are to be removed from the store."""

from __future__ import annotations

from collections.abc import Sequence

from hvsnap.catalog.db import Cursor, Database, Row
from hvsnap.catalog.row_sums import whole
from hvsnap.catalog.rows import checked, or_damaged
from hvsnap.errors import ImageUnknown, Refused, SnapshotPromoted, SnapshotUnknown
from hvsnap.model import Image, ImageId, SnapshotId

_COLUMNS = "id, name, description, snapshot, created_at"


# No index is asked which there are: one that is damaged would hide a snapshot's image, and let the snapshot be deleted.
_ALL = f"SELECT {_COLUMNS}, {whole('images')} FROM images ORDER BY +name"


@or_damaged
def _image(row: Row) -> Image:
    image, name, description, snapshot, created_at = checked(row)
    return Image(ImageId(image), name, description, SnapshotId(snapshot), created_at)


def promoted(snapshot: SnapshotId, images: Sequence[Image]) -> SnapshotPromoted:
    """Return the error for a snapshot that images were made of; it names them."""
    names = ", ".join(f"{one.name} ({one.id})" for one in images)
    hint = f"delete the image first: `hvsnap image-delete {images[0].id}`"
    return SnapshotPromoted(f"snapshot {snapshot} is behind image {names}", hint=hint)


async def read_all(reader: Database) -> list[Image]:
    """Return all images, by name."""
    return [_image(row) for row in await reader.read(_ALL)]


async def read_objects_to_remove(reader: Database) -> list[ImageId]:
    """Return images that are not in the catalog, and whose objects the store may hold."""
    return [ImageId(row[0]) for row in await reader.read("SELECT id FROM image_objects_to_remove ORDER BY id")]


async def add(cursor: Cursor, image: Image) -> None:
    """Add an image. Raises :class:`SnapshotUnknown`, :class:`Refused` for a name that is taken."""
    if not await cursor.read("SELECT 1 FROM snapshots WHERE id = ?", (image.snapshot,)):
        raise SnapshotUnknown(f"there is no snapshot {image.snapshot}")
    if await cursor.read("SELECT 1 FROM images WHERE name = ?", (image.name,)):
        raise Refused(f"there is an image {image.name} already", hint="choose another name")
    values = (image.id, image.name, image.description, image.snapshot, image.created_at)
    await cursor.execute(f"INSERT INTO images ({_COLUMNS}) VALUES (?, ?, ?, ?, ?)", values)


async def remove(cursor: Cursor, image: ImageId) -> None:
    """Remove an image. Raises :class:`ImageUnknown`."""
    if not await cursor.execute("DELETE FROM images WHERE id = ?", (image,)):
        raise ImageUnknown(f"there is no image {image}")


async def expect_object(cursor: Cursor, image: ImageId) -> None:
    """Note that the store may hold an object of an image that is not in the catalog."""
    await cursor.execute("INSERT OR IGNORE INTO image_objects_to_remove VALUES (?)", (image,))


async def forget_object(cursor: Cursor, image: ImageId) -> None:
    """Cross it out."""
    await cursor.execute("DELETE FROM image_objects_to_remove WHERE id = ?", (image,))


async def check_unpromoted(cursor: Cursor, snapshot: SnapshotId) -> None:
    """Raise :class:`SnapshotPromoted` if there is an image of the snapshot."""
    found = [image for image in map(_image, await cursor.read(_ALL)) if image.snapshot == snapshot]
    if found:
        raise promoted(snapshot, found)
