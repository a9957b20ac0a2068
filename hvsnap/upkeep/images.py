"""Images in catalog and store: the object first, then the row; a deletion the other way round.

Before an object is written, or its row deleted, the catalog notes that the object may have to be removed. Killed
anywhere, the next look at these notes removes what nobody knows of; what the catalog knows and the store lacks is
written again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Damaged, FormatUnknown, HvsnapError, NotFound
from hvsnap.happenings import EventType
from hvsnap.model import Image, ImageId
from hvsnap.store.blocks import PackedBlocks

log = logging.getLogger(__name__)


class ImageKeeper:
    """Makes and deletes images, one at a time.

    ``certain`` tells whether this process is still the store's only writer: asked before anything is removed.
    """

    def __init__(self, catalog: Catalog, store: PackedBlocks, certain: Callable[[], bool] = lambda: True) -> None:
        self._catalog = catalog
        self._store = store
        self._certain = certain
        self._turn = asyncio.Lock()

    async def create(self, image: Image, payload: dict[str, Any]) -> None:
        """Make an image: durable in the store and in the catalog on return, or not there.

        Raises :class:`SnapshotUnknown`, :class:`Refused` for a name that is taken, what store and catalog raise.
        """
        async with self._turn:
            async with self._catalog.write() as tx:
                await tx.expect_image_object(image.id)
            try:
                await self._store.images.put(image)
                async with self._catalog.write() as tx:
                    await tx.add_image(image)
                    await tx.forget_image_object(image.id)
                    await tx.emit(EventType.IMAGE_CREATED, payload)
            except HvsnapError:
                await self._remove(image.id)
                raise

    async def delete(self, image: ImageId, payload: dict[str, Any]) -> None:
        """Delete an image; where the store does not answer, its object goes later. Raises :class:`ImageUnknown`."""
        async with self._turn:
            async with self._catalog.write() as tx:
                await tx.remove_image(image)
                await tx.expect_image_object(image)
                await tx.emit(EventType.IMAGE_DELETED, payload)
            await self._remove(image)

    async def reconcile(self) -> int:
        """Let the store hold the catalog's images, whole; return how many objects were written or removed.

        Objects that the catalog has no note of are left alone: it may be an older copy that was put back.
        """
        async with self._turn:
            done = 0
            for leaving in await self._catalog.image_objects_to_remove():
                done += await self._remove(leaving)
            for image in await self._catalog.images():
                done += await self._mend(image)
            return done

    async def _mend(self, image: Image) -> bool:
        """Write an image's object if the store lacks it, or holds it damaged."""
        with contextlib.suppress(Damaged, FormatUnknown, NotFound):
            if await self._store.images.get(image.id) == image:
                return False
        if not self._certain():
            return False
        log.warning("the object of image %s is missing or damaged, and is written again", image.id)
        await self._store.images.delete(image.id)
        await self._store.images.put(image)
        return True

    async def _remove(self, image: ImageId) -> bool:
        """Remove the object of an image that is not in the catalog; what fails is tried again by the next sweep."""
        if not self._certain():
            return False
        try:
            await self._store.images.delete(image)
            async with self._catalog.write() as tx:
                await tx.forget_image_object(image)
        except HvsnapError as error:
            log.warning("the object of image %s is removed another time: %s", image, error.message)
            return False
        return True
