"""Passing on what happens."""

from __future__ import annotations

from dataclasses import dataclass, field

from hvsnap.model import Event, Progress
from hvsnap.ports import Publisher


@dataclass
class Announcer:
    """Passes what happens on to everybody who listens; they are known later than those who announce."""

    listeners: list[Publisher] = field(default_factory=list)

    def event(self, event: Event) -> None:
        """Announce a committed event."""
        for listener in self.listeners:
            listener.event(event)

    def progress(self, progress: Progress) -> None:
        """Announce progress."""
        for listener in self.listeners:
            listener.progress(progress)
