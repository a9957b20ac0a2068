"""HTTP over the service: routes, one call each, one form for every error. :mod:`hvsnap.wire` lists the endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from hvsnap import wire
from hvsnap.api import storage
from hvsnap.api.limits import Guard
from hvsnap.api.peers import Doorkeeper, PeerCheck
from hvsnap.api.reading import Reading
from hvsnap.errors import BadRequest, HvsnapError, NotFound
from hvsnap.model import Event, Progress, State
from hvsnap.service import views
from hvsnap.service.requests import DiskRequest, GuestDisks, ReinitRequest, RollbackRequest, SnapshotRequest
from hvsnap.service.service import Service

SEQUENCE_MAX = 2**63 - 1
MESSAGES_MAX = 3

Name = Annotated[str, Query(max_length=4096)]
Id = Annotated[str, Path(max_length=4096)]
Sequence = Annotated[int | None, Query(ge=0, le=SEQUENCE_MAX)]

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": wire.Error, "description": "Refused; nothing was changed"},
    "5XX": {"model": wire.Error, "description": "Failed"},
}

EVENT_STREAM: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
STREAM_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def create_app(service: Service, doorkeeper: Doorkeeper | None = None, *, read_only: bool = False) -> FastAPI:
    """Return the application; it holds nothing but the service. Without a doorkeeper whoever connects may do all."""
    wire.build()
    app = FastAPI(
        title="hvsnap",
        summary="Snapshots of running KVM guests",
        version="1",
        # Both pages load scripts from elsewhere, which a socket on the host has no business with.
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_id,
        responses=ERRORS,
    )
    app.include_router(_snapshots(service), prefix=wire.API, tags=["snapshots"])
    app.include_router(_serving(service), prefix=wire.API, tags=["snapshots"])
    app.include_router(_policies(service), prefix=wire.API, tags=["policies"])
    app.include_router(_disks(service), prefix=wire.API, tags=["disks"])
    app.include_router(_tasks(service), prefix=wire.API, tags=["disks"])
    app.include_router(storage.images(service), prefix=wire.API, tags=["images"])
    app.include_router(storage.store(service), prefix=wire.API, tags=["store"])
    app.include_router(_daemon(service), prefix=wire.API, tags=["daemon"])
    app.add_exception_handler(HvsnapError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    if read_only:
        app.add_middleware(Reading)
    app.add_middleware(Guard)
    app.add_middleware(PeerCheck, doorkeeper=doorkeeper or Doorkeeper())
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


# -- routes ---------------------------------------------------------------------------------------


def _snapshots(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/snapshots")
    async def list_snapshots(
        guest: Name = "",
        disk: Name = "",
        state: State | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    ) -> wire.SnapshotList:
        return await service.snapshots.listing(guest=guest, disk=disk, state=state, limit=limit)

    @router.get("/snapshots/{id}")
    async def get_snapshot(id: Id) -> wire.Snapshot:
        return await service.snapshots.info(id)

    @router.post("/snapshots", status_code=202)
    async def create_snapshots(body: wire.SnapshotCreate) -> wire.SnapshotList:
        request = SnapshotRequest(
            guest=body.guest,
            disks=tuple(body.disks),
            name=body.name,
            description=body.description,
            tags=body.tags,
            consistency=body.consistency,
            group=body.group,
            others=tuple(GuestDisks(other.guest, tuple(other.disks)) for other in body.others),
            wait=body.wait,
        )
        return await service.snapshots.views(await service.captures.create(request))

    @router.post("/snapshots/{id}/cancel", status_code=202)
    async def cancel_snapshot(id: Id) -> wire.Snapshot:
        return await service.snapshots.cancel(id)

    @router.post("/snapshots/{id}/edit")
    async def edit_snapshot(id: Id, body: wire.SnapshotEdit) -> wire.Snapshot:
        return await service.snapshots.edit(
            id, name=body.name, description=body.description, tags=body.tags, usual=body.usual
        )

    @router.post("/snapshots/{id}/lock")
    async def lock_snapshot(id: Id, body: wire.SnapshotLock) -> wire.Snapshot:
        return await service.snapshots.lock(id, body.until.timestamp())

    @router.post("/snapshots/delete")
    async def delete_snapshots(body: wire.SnapshotDelete) -> wire.Deletion:
        return await service.snapshots.delete(body.ids, dry_run=body.dry_run)

    @router.get("/chains")
    async def list_chains() -> wire.ChainList:
        return await service.chains.listing()

    @router.get("/chains/{disk:path}")
    async def get_chain(disk: Id) -> wire.Chain:
        return await service.chains.info(disk)

    return router


def _serving(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/snapshots/{id}/serve")
    async def serve_snapshot(id: Id, body: wire.SnapshotServe) -> wire.Served:
        return await service.serving.serve(id, writable=body.writable)

    @router.post("/snapshots/{id}/look", response_class=StreamingResponse, responses={200: {"content": EVENT_STREAM}})
    async def look_into_snapshot(id: Id, body: wire.SnapshotServe) -> StreamingResponse:
        items = service.serving.look(id, writable=body.writable)
        # Begun before it is answered: what is refused is an error like all others.
        return StreamingResponse(_look_stream(await anext(items), items), headers=STREAM_HEADERS)

    @router.post("/snapshots/{id}/unserve")
    async def unserve_snapshot(id: Id) -> wire.Served:
        return await service.serving.unserve(id)

    @router.get("/served")
    async def list_served() -> wire.ServedList:
        return await service.serving.listing()

    return router


def _policies(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/policies")
    async def list_policies() -> wire.PolicyList:
        return await service.policies.listing()

    @router.post("/policies", status_code=201)
    async def create_policy(body: wire.PolicyCreate) -> wire.Policy:
        return await service.policies.create(body)

    @router.post("/policies/cancel")
    async def cancel_policy(body: wire.PolicyDisks) -> wire.PolicyApplied:
        return await service.policies.cancel(body.disks)

    @router.post("/policies/{policy}/edit")
    async def edit_policy(policy: Id, body: wire.PolicyEdit) -> wire.Policy:
        return await service.policies.edit(policy, body)

    @router.post("/policies/{policy}/delete")
    async def delete_policy(policy: Id) -> wire.Policy:
        return await service.policies.delete(policy)

    @router.post("/policies/{policy}/apply")
    async def apply_policy(policy: Id, body: wire.PolicyDisks) -> wire.PolicyApplied:
        return await service.policies.apply(policy, body.disks)

    return router


def _disks(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/guests")
    async def list_guests() -> wire.GuestList:
        return await service.guests.listing()

    @router.post("/disks", status_code=202)
    async def create_disk(body: wire.DiskCreate) -> wire.Task:
        request = DiskRequest(
            snapshot=body.snapshot,
            path=body.path,
            format=body.format,
            force=body.force,
            pool=body.pool,
            attach=None if body.attach is None else (body.attach.guest, body.attach.target),
            instant=body.instant,
        )
        return views.task(await service.disks.create(request))

    @router.post("/disks/{disk:path}/rollback", status_code=202, responses={200: {"model": wire.RollbackAnswer}})
    async def rollback_disk(disk: Id, body: wire.Rollback, response: Response) -> wire.RollbackAnswer:
        request = RollbackRequest(
            disk=disk,
            snapshot=body.snapshot,
            stop=body.stop,
            start=body.start,
            safety_snapshot=body.safety_snapshot,
        )
        if body.dry_run:
            response.status_code = 200
            return wire.RollbackAnswer(plan=await service.rollbacks.plan(request), task=None)
        plan, task = await service.rollbacks.begin(request)
        return wire.RollbackAnswer(plan=plan, task=views.task(task))

    @router.post("/disks/{disk:path}/reinit", status_code=202, responses={200: {"model": wire.RollbackAnswer}})
    async def reinitialise_disk(disk: Id, body: wire.Reinit, response: Response) -> wire.RollbackAnswer:
        request = ReinitRequest(disk=disk, stop=body.stop, start=body.start, safety_snapshot=body.safety_snapshot)
        if body.dry_run:
            response.status_code = 200
            return wire.RollbackAnswer(plan=await service.rollbacks.plan_reinit(request), task=None)
        plan, task = await service.rollbacks.begin_reinit(request)
        return wire.RollbackAnswer(plan=plan, task=views.task(task))

    @router.post("/disks/{disk:path}/edit")
    async def edit_disk(disk: Id, body: wire.DiskEdit) -> wire.Disk:
        return await service.known_disks.edit(disk, body)

    @router.post("/disks/{disk:path}/release")
    async def release_disk(disk: Id, body: wire.DiskRelease) -> wire.DiskReleased:
        return await service.known_disks.release(disk, dry_run=body.dry_run)

    return router


def _tasks(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/tasks")
    async def list_tasks() -> wire.TaskList:
        return wire.TaskList(tasks=[views.task(task) for task in service.tasks.all()])

    @router.get("/tasks/{id}")
    async def get_task(id: Id) -> wire.Task:
        return views.task(service.tasks.get(id))

    @router.post("/tasks/{id}/cancel", status_code=202)
    async def cancel_task(id: Id) -> wire.Task:
        return views.task(service.tasks.cancel(id))

    return router


def _daemon(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/status")
    async def get_status() -> wire.Status:
        return await service.status.status()

    @router.get("/doctor")
    async def examine() -> wire.DoctorReport:
        return await service.doctor.examine()

    @router.post("/recover")
    async def recover(image: Name = "") -> wire.Recovery:
        return await (service.recovery.recover_image(image) if image else service.recovery.recover())

    @router.post("/hooks", status_code=202)
    async def take_hook(body: wire.HookCall) -> wire.HookTaken:
        return await service.hooks.answer(body)

    @router.get("/events", response_class=StreamingResponse, responses={200: {"content": EVENT_STREAM}})
    async def follow_events(
        guest: Name = "",
        since: Sequence = None,
        last_event_id: Annotated[str | None, Header(max_length=32)] = None,
    ) -> StreamingResponse:
        items = service.feed.open(_resume_after(last_event_id, since), guest)
        return StreamingResponse(_event_stream(items), headers=STREAM_HEADERS)

    return router


# -- the event stream -----------------------------------------------------------------------------


def _resume_after(last_event_id: str | None, since: int | None) -> int | None:
    """Return the sequence to go on after: a reader that comes back knows better than its first address."""
    if not last_event_id:
        return since
    if not last_event_id.isascii() or not last_event_id.isdigit() or int(last_event_id) > SEQUENCE_MAX:
        raise BadRequest("Last-Event-ID is not a sequence number", hint="send the id of the last event as it came")
    return int(last_event_id)


async def _event_stream(items: AsyncIterator[Event | Progress | None]) -> AsyncIterator[bytes]:
    """Yield items as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    # At once: whoever connects learns that the stream stands before anything happens.
    yield b": keep-alive\n\n"
    async with aclosing(items) as open_items:  # type: ignore[type-var]
        async for item in open_items:
            if item is None:
                yield b": keep-alive\n\n"
            elif isinstance(item, Event):
                data = views.event(item).model_dump_json()
                yield f"id: {item.sequence}\nevent: event\ndata: {data}\n\n".encode()
            else:
                yield f"event: progress\ndata: {views.progress(item).model_dump_json()}\n\n".encode()
            # Between two items of a long backlog the loop sees that the reader is gone, and serves others.
            await asyncio.sleep(0)


async def _look_stream(first: wire.Served, items: AsyncIterator[wire.Served]) -> AsyncIterator[bytes]:
    """Yield what is served as server-sent events."""
    async with aclosing(items):  # type: ignore[type-var]
        yield _told(first)
        async for item in items:
            yield _told(item)


def _told(item: wire.Served) -> bytes:
    return f"event: served\ndata: {item.model_dump_json()}\n\n".encode()


# -- errors ---------------------------------------------------------------------------------------


def error_response(error: HvsnapError, status: int | None = None) -> JSONResponse:
    """Return an error in the form that all errors have."""
    body = wire.Error.of(error).model_dump(mode="json")
    return JSONResponse(body, error.http_status if status is None else status)


async def _on_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, HvsnapError):
        raise error
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Answer for a path or a method that does not exist, and for a body that is no JSON."""
    if not isinstance(error, HTTPException):
        raise error
    hint = "the endpoints stand in /openapi.json"
    if error.status_code == 404:
        return error_response(NotFound(f"there is nothing at {request.url.path[:100]}", hint=hint))
    return error_response(BadRequest(str(error.detail), hint=hint), error.status_code)


async def _on_invalid(_request: Request, error: Exception) -> Response:
    """Name the parts of a request that are wrong, without repeating what they held."""
    if not isinstance(error, RequestValidationError):
        raise error
    problems = [f"{'.'.join(map(str, one['loc']))[:100]}: {one['msg'][:200]}" for one in error.errors()[:MESSAGES_MAX]]
    more = len(error.errors()) - MESSAGES_MAX
    text = "; ".join(problems) + (f"; and {more} more" if more > 0 else "")
    return error_response(BadRequest(f"the request is wrong: {text}", hint="its form stands in /openapi.json"))
