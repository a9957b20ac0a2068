"""HTTP over the daemon's Unix socket, for a command that waits for its answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from hvsnap import wire
from hvsnap.errors import DaemonUnreachable, HvsnapError

TIMEOUT_S = 60.0
STREAM_TIMEOUT_S = 45.0
"""The daemon says something on the event stream at least every 15 seconds."""

M = TypeVar("M", bound=BaseModel)


class DaemonError(HvsnapError):
    """What the daemon refused or failed at, with its own code and exit status."""

    def __init__(self, error: wire.Error) -> None:
        super().__init__(error.message, hint=error.hint)
        self.error = error

    @property
    def status(self) -> int:
        """What the command line exits with."""
        return self.error.exit_status

    def as_dict(self) -> dict[str, str]:
        """Return the daemon's own words."""
        return {"code": self.error.code, "message": self.message, "hint": self.hint}


@dataclass(frozen=True, slots=True)
class StreamItem:
    """One item of the event stream."""

    id: str
    event: wire.Event | None = None
    progress: wire.Progress | None = None


class Client:
    """Calls the daemon. Every method raises :class:`DaemonUnreachable` or :class:`DaemonError`."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        # No TLS on a Unix socket: without `verify` httpx would load the host's certificates all the same, for 35 ms.
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=socket, verify=False),
            base_url=f"http://hvsnap{wire.API}",
            timeout=TIMEOUT_S,
        )

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def get(self, path: str, answer: type[M], **parameters: str | int | None) -> M:
        """GET and return the typed answer."""
        known = {name: value for name, value in parameters.items() if value is not None}
        return self._call("GET", path, answer, params=known)

    def post(self, path: str, answer: type[M], body: BaseModel | None = None) -> M:
        """POST and return the typed answer; there is no time limit, since the daemon may be at work."""
        content = None if body is None else body.model_dump(mode="json")
        return self._call("POST", path, answer, json=content, timeout=None)

    def events(self, last_id: str = "") -> Iterator[StreamItem]:
        """Yield stored events and progress as they come, from after ``last_id`` on if it is given."""
        headers = {"Last-Event-ID": last_id} if last_id else {}
        try:
            with self._http.stream("GET", "/events", headers=headers, timeout=STREAM_TIMEOUT_S) as response:
                if response.status_code >= 400:
                    response.read()
                    raise self._error(response)
                yield from _items(response.iter_lines())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _call(self, method: str, path: str, answer: type[M], **options: Any) -> M:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code >= 400:
            raise self._error(response)
        return answer.model_validate_json(response.content)

    def _error(self, response: httpx.Response) -> HvsnapError:
        try:
            return DaemonError(wire.Error.model_validate_json(response.content))
        except ValidationError:
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
            return DaemonUnreachable(f"the daemon does not answer on {self._socket}: {why}")
        return DaemonUnreachable(
            f"the daemon went away in the middle: {text}",
            hint="what it was doing is safe: see `hvsnap snapshot-list` when it is back",
        )


def _items(lines: Iterator[str]) -> Iterator[StreamItem]:
    """Parse server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    item_id, kind, data = "", "", []
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
