"""HTTP over the daemon's Unix socket, for a command that waits for its answer."""

from __future__ import annotations

import contextlib
import json
import socket as sockets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from hvsnap import wire
from hvsnap.errors import BadRequest, DaemonUnreachable, HvsnapError

TIMEOUT_S = 60.0
STREAM_TIMEOUT_S = 45.0
"""The daemon says something on the event stream at least every 15 seconds."""

LET_GO_S = 5.0
LET_GO_POLL_S = 0.02

NAME_LENGTH_MAX = 4096

M = TypeVar("M", bound=BaseModel)


class DaemonAbsent(DaemonUnreachable):
    """Nobody listens on the socket: no daemon runs, or it has another configuration."""


class DaemonError(HvsnapError):
    """What the daemon refused or failed at, with its own code and exit status."""

    def __init__(self, error: wire.Error) -> None:
        super().__init__(error.message, hint=error.hint)
        self.error = error
        self.exit_status = error.exit_status

    def as_dict(self) -> dict[str, str]:
        """Return the daemon's own words."""
        return {"code": self.error.code, "message": self.message, "hint": self.hint}


@dataclass(frozen=True, slots=True)
class StreamItem:
    """One item of the event stream."""

    id: str
    event: wire.Event | None = None
    progress: wire.Progress | None = None


def place(*parts: str) -> str:
    """Return the path of something that a user named; raises :class:`BadRequest` for what cannot be a name."""
    for part in parts:
        if not part or len(part) > NAME_LENGTH_MAX:
            raise BadRequest(f"a name has 1 to {NAME_LENGTH_MAX} characters", hint="check the command line")
    # Dots, too: `..` as a name must not become a step upwards.
    return "".join("/" + quote(part, safe="").replace(".", "%2E") for part in parts)


def body(kind: type[M], **fields: Any) -> M:
    """Return a request's body; raises :class:`BadRequest` for what it cannot hold."""
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{what}: {first['msg'].lower()}", hint="see --help for what it may be") from error


class Client:
    """Calls the daemon. Every method raises :class:`DaemonUnreachable` or :class:`DaemonError`."""

    def __init__(self, socket: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._socket = socket
        self._timeout_s = timeout_s
        self._stream: sockets.socket | None = None
        # No TLS on a Unix socket: without `verify` httpx would load the host's certificates all the same, for 35 ms.
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=socket, verify=False),
            base_url=f"http://hvsnap{wire.API}",
            timeout=timeout_s,
        )

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def another(self) -> Client:
        """Return a client of its own for another thread."""
        return Client(self._socket, timeout_s=self._timeout_s)

    def hang_up(self) -> None:
        """End the event stream, from whatever thread: its reader sees it end."""
        stream = self._stream
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.shutdown(sockets.SHUT_RDWR)

    def get(self, path: str, answer: type[M], **parameters: str | int | None) -> M:
        """GET and return the typed answer."""
        known = {name: value for name, value in parameters.items() if value is not None}
        return self._call("GET", path, answer, params=known)

    def post(self, path: str, answer: type[M], body: BaseModel | None = None) -> M:
        """POST and return the typed answer; there is no time limit, since the daemon may be at work."""
        content = None if body is None else body.model_dump(mode="json", exclude_unset=True)
        return self._call("POST", path, answer, json=content, timeout=None)

    def events(self, guest: str = "") -> Iterator[StreamItem]:
        """Yield stored events and progress as they come, of one guest or all; ends when the daemon does.

        The first item, which is empty, comes when the stream stands: nothing that happens afterwards is missed.
        """
        known = {"guest": guest} if guest else {}
        try:
            with self._http.stream("GET", "/events", params=known, timeout=STREAM_TIMEOUT_S) as response:
                if response.status_code >= 400:
                    response.read()
                    raise self._error(response)
                self._stream = response.extensions["network_stream"].get_extra_info("socket")
                yield StreamItem("")
                yield from _items(response.iter_lines())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    @contextlib.contextmanager
    def looking(self, snapshot: str, body: BaseModel) -> Iterator[Iterator[wire.Served]]:
        """Have a snapshot served as long as the block lasts, however this process ends.

        Gives what is served, at once and then every 15 seconds; the iteration ends when it is not served any more.
        """
        content = body.model_dump(mode="json", exclude_unset=True)
        path = place("snapshots", snapshot, "look")
        try:
            with self._http.stream("POST", path, json=content, timeout=httpx.Timeout(STREAM_TIMEOUT_S)) as response:
                if response.status_code >= 400:
                    response.read()
                    raise self._error(response)
                yield (
                    wire.Served.model_validate_json(line[6:]) for line in response.iter_lines() if line[:6] == "data: "
                )
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def let_go(self, served: wire.Served) -> None:
        """Return when the daemon has seen that we look into a snapshot no more: from then on it may be deleted."""
        deadline = time.monotonic() + LET_GO_S
        while time.monotonic() < deadline:
            listed = self.get("/served", wire.ServedList).served
            now = next((one for one in listed if one.snapshot == served.snapshot), None)
            if now is None or now.lookers < served.lookers:
                return
            time.sleep(LET_GO_POLL_S)

    def _call(self, method: str, path: str, answer: type[M], **options: Any) -> M:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code >= 400:
            raise self._error(response)
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            raise self._foreign(response) from error

    def _error(self, response: httpx.Response) -> HvsnapError:
        try:
            return DaemonError(wire.Error.model_validate_json(response.content))
        except ValidationError:
            return self._foreign(response)

    def _foreign(self, response: httpx.Response) -> DaemonUnreachable:
        return DaemonUnreachable(
            f"{self._socket} answered with {response.status_code}, not as a daemon of this release does",
            hint="is another program listening there, or a daemon of another release?",
        )

    def _unreachable(self, error: httpx.HTTPError) -> DaemonUnreachable:
        cause = error.__cause__ or error.__context__ or error
        text = str(cause) or type(cause).__name__
        if "Permission" in text:
            hint = "use sudo, or join the group that the socket belongs to (socket_group in the configuration)"
            return DaemonUnreachable(f"{self._socket}: permission denied", hint=hint)
        if isinstance(error, httpx.ConnectError):
            missing = not Path(self._socket).exists()
            why = "there is no such socket" if missing else "nobody listens there"
            return DaemonAbsent(f"the daemon does not answer on {self._socket}: {why}")
        if isinstance(error, httpx.TimeoutException):
            hint = "it may be busy, or hang: try again, and see its log"
            return DaemonUnreachable(f"the daemon on {self._socket} took too long to answer", hint=hint)
        return DaemonUnreachable(
            f"the daemon went away in the middle: {text}",
            hint="what it was doing is safe: see `hvsnap snapshot-list` when it is back",
        )


def _items(lines: Iterator[str]) -> Iterator[StreamItem]:
    """Parse server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    item_id, kind = "", ""
    data: list[str] = []
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "" and data:
            raw = json.loads("\n".join(data))
            if kind == "event":
                yield StreamItem(item_id, event=wire.Event.model_validate(raw))
            elif kind == "progress":
                yield StreamItem("", progress=wire.Progress.model_validate(raw))
            item_id, kind, data = "", "", []
        elif name == "id":
            item_id = value
        elif name == "event":
            kind = value
        elif name == "data":
            data.append(value)
