"""What one run of a command works with: the options that every command takes, the daemon, where the answer goes.

Nothing heavy is imported before it is needed: `hvsnap --help` must not wait for HTTP and models that it does not use.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvsnap.cli.text import safe

if TYPE_CHECKING:
    from pydantic import BaseModel

    from hvsnap.cli.client import Client
    from hvsnap.config import Settings


@dataclass(frozen=True, slots=True)
class Session:
    """The common options as they are in force: those before the command, and those after it laid over them."""

    connect: str = ""
    config: Path | None = None
    json: bool = False
    quiet: bool = False

    def overlaid(self, *, connect: str, config: Path | None, as_json: bool, quiet: bool) -> Session:
        """Return the session with a command's own options laid over it."""
        return replace(
            self,
            connect=connect or self.connect,
            config=config or self.config,
            json=as_json or self.json,
            quiet=quiet or self.quiet,
        )

    # -- the configuration and the daemon ---------------------------------------------------------

    def settings(self) -> Settings:
        """Return the configuration, `--connect` in the place of its URI. Raises :class:`ConfigInvalid`."""
        from hvsnap.config import load  # noqa: PLC0415 - see the module's docstring

        settings = load(self.config)
        if not self.connect:
            return settings
        hypervisor = settings.hypervisor.model_copy(update={"libvirt_uri": self.connect})
        return settings.model_copy(update={"hypervisor": hypervisor})

    @contextmanager
    def client(self, *, timeout_s: float | None = None, dispensable: bool = False) -> Iterator[Client]:
        """Give a client of the daemon. `--connect` does not reach it, which is said, unless we could do without it."""
        from hvsnap.cli.client import TIMEOUT_S, Client  # noqa: PLC0415 - see the module's docstring

        if not dispensable:
            self.remark_connect()
        client = Client(self.settings().socket, timeout_s=TIMEOUT_S if timeout_s is None else timeout_s)
        try:
            yield client
        finally:
            client.close()

    def remark_connect(self) -> None:
        """Say that `--connect` is not heeded, if it was given."""
        if self.connect:
            self.remark("--connect has no effect here: the daemon answers, for the hypervisor that it was started with")

    # -- what is said -----------------------------------------------------------------------------

    def answer(self, value: BaseModel, text: str) -> None:
        """Print the answer: the object with `--json`, else ``text``, if it is not empty."""
        if self.json:
            say(json_text(value.model_dump(mode="json")))
        elif text:
            say(text)

    def remark(self, text: str) -> None:
        """Say something beside the answer, on stderr; not with `--quiet`."""
        if not self.quiet:
            sys.stderr.write(f"hvsnap: {safe(text)}\n")
            sys.stderr.flush()


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """Return JSON in ASCII: what comes from guests is escaped, for whatever terminal or locale it meets."""
    return json.dumps(value, indent=indent)


def say(text: str) -> None:
    """Print a line of the answer at once, since somebody may be reading as it comes."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
