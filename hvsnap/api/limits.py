"""What every request passes through: bounds on its body, and an answer for whatever goes wrong below."""

from __future__ import annotations

import asyncio
import logging

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hvsnap import wire
from hvsnap.errors import BadRequest, Failed, HvsnapError

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 1 << 20
"""The largest request that makes sense (deleting 4096 snapshots) has 80 KiB."""

BODY_TIMEOUT_S = 30.0


class BodyTooLarge(BadRequest):
    """The request's body is larger than any that makes sense."""

    code = "body-too-large"
    http_status = 413


class BodyTooSlow(BadRequest):
    """The request's body did not arrive in time."""

    code = "body-too-slow"
    http_status = 408


class Guard:
    """ASGI middleware. Bodies are read as a whole, bounded in size and time, before anything looks at them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            body = await _read_body(receive)
            if body is not None:
                await self._app(scope, _replay(body, receive), sending)
        except Exception as error:
            if not isinstance(error, HvsnapError):
                log.exception("%s %s failed", scope["method"], scope["path"][:100])
                error = Failed("the request met a fault in hvsnap", hint="the daemon's log has the details")
            if started:
                raise
            answer = JSONResponse(wire.Error.of(error).model_dump(mode="json"), error.http_status)
            # What was not read of the body must not be taken for the next request.
            answer.headers["Connection"] = "close"
            await answer(scope, receive, send)


async def _read_body(receive: Receive) -> bytes | None:
    """Return the whole body; None when the client has gone away."""
    parts = []
    size_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                size_bytes += len(part)
                if size_bytes > BODY_BYTES_MAX:
                    hint = f"at most {BODY_BYTES_MAX} bytes are taken"
                    raise BodyTooLarge("the request's body is too large", hint=hint)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        hint = f"send it within {BODY_TIMEOUT_S:.0f} s"
        raise BodyTooSlow("the request's body did not arrive in time", hint=hint) from error


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the body once, and then waits for the client's end."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
