"""Commands about images."""

from __future__ import annotations

import os

from hvsnap import wire
from hvsnap.cli import render
from hvsnap.cli.client import body, place
from hvsnap.cli.session import Session
from hvsnap.cli.tasks import finished
from hvsnap.cli.text import safe


def create(session: Session, snapshot: str, name: str, description: str) -> None:
    """Make an image of a snapshot."""
    request = body(wire.ImageCreate, snapshot=snapshot, name=name, description=description)
    with session.client() as client:
        made = client.post("/images", wire.Image, request)
    what = f"image {safe(made.name)} of {made.snapshot}, {safe(made.guest)}/{safe(made.target)}"
    session.answer(made, made.id if session.quiet else f"{made.id}  {what}")


def listing(session: Session) -> None:
    """Show the images."""
    with session.client() as client:
        answer = client.get("/images", wire.ImageList)
    headers = ("ID", "NAME", "SNAPSHOT", "GUEST", "DISK", "SIZE", "CREATED", "DESCRIPTION")
    rows = [
        (
            one.id,
            one.name,
            one.snapshot,
            one.guest,
            one.target,
            render.size(one.size_bytes),
            render.when(one.created_at),
            one.description,
        )
        for one in answer.images
    ]
    session.answer(answer, render.table(headers, rows, headers=not session.quiet))


def export(session: Session, image: str, path: str, *, detach: bool) -> int:
    """Write an image to a file; return the exit status. ``path`` may be relative to where the command runs."""
    # The daemon has a working directory of its own. An empty path stays one, for the daemon to refuse.
    request = body(wire.ImageExport, path=os.path.abspath(path) if path else path)
    with session.client() as client:
        task = client.post(place("images", image, "export"), wire.Task, request)
        return finished(session, client, task, "image-export", detach=detach)


def delete(session: Session, image: str) -> None:
    """Delete an image."""
    with session.client() as client:
        gone = client.post(place("images", image, "delete"), wire.Image)
    session.answer(gone, safe(f"image {gone.name} is deleted; snapshot {gone.snapshot} stays"))
