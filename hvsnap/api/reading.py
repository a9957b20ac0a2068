"""Of a daemon that reads another host's store: what it does, and a clear answer to everything else."""

from __future__ import annotations

import re

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hvsnap import wire
from hvsnap.errors import Refused

_DONE = re.compile(
    re.escape(wire.API)
    + r"/(disks|tasks/[^/]+/cancel|recover|hooks|store/check|snapshots/[^/]+/((un)?serve|look)|images/[^/]+/export)"
)
"""Requests that are no GET and change nothing of the store, nor of what the catalog says of it."""


class Reading:
    """ASGI middleware that refuses what would change snapshots, policies or the store."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD") and not _DONE.fullmatch(scope["path"]):
            hint = "`hvsnap disk-create` makes new disks of its snapshots; all else is for the host that writes to it"
            error = Refused("this daemon only reads another host's store (store.read_only)", hint=hint)
            answer = JSONResponse(wire.Error.of(error).model_dump(mode="json"), error.http_status)
            answer.headers["Connection"] = "close"  # the body was not read
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)
