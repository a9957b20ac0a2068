"""The API's routes of images and the store, beside those of :mod:`hvsnap.api.app`."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query

from hvsnap import wire
from hvsnap.service import views
from hvsnap.service.service import Service

Id = Annotated[str, Path(max_length=4096)]


def images(service: Service) -> APIRouter:
    """Return the routes of images."""
    router = APIRouter()

    @router.get("/images")
    async def list_images() -> wire.ImageList:
        return await service.images.listing()

    @router.post("/images", status_code=201)
    async def create_image(body: wire.ImageCreate) -> wire.Image:
        return await service.images.create(body)

    @router.post("/images/{image}/export", status_code=202)
    async def export_image(image: Id, body: wire.ImageExport) -> wire.Task:
        return views.task(await service.images.export(image, body.path))

    @router.post("/images/{image}/delete")
    async def delete_image(image: Id) -> wire.Image:
        return await service.images.delete(image)

    return router


def store(service: Service) -> APIRouter:
    """Return the routes of the store, and of what was stored over time."""
    router = APIRouter()

    @router.get("/store")
    async def get_store() -> wire.StoreInfo:
        return await service.store.info()

    @router.get("/usage")
    async def get_usage(
        since: wire.Instant | None = None,
        until: wire.Instant | None = None,
        by: Literal["chain", "host"] = "chain",
        points: Annotated[int, Query(ge=0, le=1000)] = 0,
    ) -> wire.Usage:
        start, end = (None if moment is None else moment.timestamp() for moment in (since, until))
        return await service.usage.report(start, end, by, points)

    @router.post("/store/check", status_code=202)
    async def check_store() -> wire.Task:
        return views.task(service.store.check())

    @router.post("/store/compact", status_code=202)
    async def compact_store(body: wire.StoreCompact) -> wire.Task:
        return views.task(service.store.compact(dry_run=body.dry_run))

    @router.post("/snapshots/verify", status_code=202)
    async def verify_snapshots(body: wire.SnapshotVerify) -> wire.Task:
        return views.task(await service.store.verify(body.ids, everything=body.all))

    @router.post("/snapshots/drill", status_code=202)
    async def drill_snapshot(body: wire.SnapshotDrill) -> wire.Task:
        return views.task(await service.drills.start(body))

    return router
