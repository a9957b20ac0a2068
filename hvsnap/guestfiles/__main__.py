"""The process: requests as lines of JSON on stdin, messages as lines of JSON on stdout, until stdin ends.

The first line says what to open: ``{"uri", "scratch"}``. It and each request are answered by messages of which the last
is ``{"done": …}`` or ``{"error": {"code", "message", "hint", "exit_status"}}``.

When stdin ends, because the command ends or was killed, libguestfs' machine is ended whatever it is doing, and
``scratch`` and the directory of a copy that is not complete are removed.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from hvsnap.errors import Failed, HvsnapError
from hvsnap.guestfiles.launch import start
from hvsnap.guestfiles.requests import Requests
from hvsnap.guestfiles.session import GuestFiles


class Lines:
    """stdin, read by a thread, so that its end is seen whatever we wait for."""

    def __init__(self) -> None:
        self.ended = False
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def next(self) -> dict[str, Any] | None:
        """Return the next request; None at the end."""
        line = self._lines.get()
        return None if self.ended or not line else json.loads(line)

    def _read(self) -> None:
        for line in sys.stdin:
            self._lines.put(line)
        self.ended = True
        self._lines.put("")
        # All that we have started and that waits for something; our own handler does nothing.
        os.killpg(0, signal.SIGTERM)


def tell(message: dict[str, Any]) -> None:
    """Send a message."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Work until stdin ends."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    lines = Lines()
    first = lines.next()
    if first is None:
        return
    scratch = Path(first["scratch"])
    leftovers = [scratch]
    try:
        guest = None
        try:
            guest = start(first["uri"], scratch)
            tell({"done": {}})
            requests = Requests(GuestFiles(guest, scratch), tell, leftovers)
            while (request := lines.next()) is not None:
                _answer(requests, request)
        except HvsnapError as error:
            _complain(error)
        finally:
            if guest is not None:
                guest.close()
    finally:
        if lines.ended:  # nobody else may be left to do it
            for path in leftovers:
                shutil.rmtree(path, ignore_errors=True)


def _answer(requests: Requests, request: dict[str, Any]) -> None:
    try:
        tell({"done": requests.answer(request)})
    except HvsnapError as error:
        _complain(error)
    except UnicodeDecodeError:
        _complain(Failed("a name in it is not UTF-8", hint="copy the directory that it lies in"))
    except RuntimeError as error:  # libguestfs' own
        _complain(Failed(f"libguestfs: {error}", hint="`hvsnap snapshot-serve` shows the bare disk"))


def _complain(error: HvsnapError) -> None:
    tell({"error": error.as_dict() | {"exit_status": error.exit_status}})


if __name__ == "__main__":
    main()
