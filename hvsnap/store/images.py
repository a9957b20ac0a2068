"""Images in the repository: small objects from which `store-rebuild` knows them."""

from __future__ import annotations

from hvsnap.model import Image, ImageId
from hvsnap.ports import ObjectStore
from hvsnap.store.image import IMAGES, decode, encode, image_of, object_name
from hvsnap.store.repository import Repository


class ImageObjects:
    """The images of one repository."""

    def __init__(self, objects: ObjectStore, repository: Repository) -> None:
        self._objects = objects
        self._repository = repository

    async def put(self, image: Image) -> None:
        """Write an image's object, durable on return. Raises :class:`~hvsnap.errors.ObjectExists`."""
        await self._objects.put(object_name(image.id), encode(image, self._repository))

    async def get(self, image: ImageId) -> Image:
        """Return what an image's object says, authenticated.

        Raises :class:`~hvsnap.errors.NotFound`, :class:`~hvsnap.errors.Damaged`,
        :class:`~hvsnap.errors.FormatUnknown`.
        """
        name = object_name(image)
        return decode(await self._objects.get(name), name, self._repository)

    async def all(self) -> list[ImageId]:
        """Return the images that have an object, in order of their ids; other objects are left out."""
        found = [image_of(item.name) async for item in self._objects.list(IMAGES)]
        return [image for image in found if image is not None]

    async def delete(self, image: ImageId) -> None:
        """Remove an image's object; one that is not there is no error."""
        await self._objects.delete(object_name(image))
