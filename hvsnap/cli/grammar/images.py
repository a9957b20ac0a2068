"""What can be typed about images."""
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

from hvsnap.cli import words
from hvsnap.cli.grammar.command import Detach, Snapshot, command
from hvsnap.cli.session import Session

IMAGES = "Images"

Image = Annotated[str, typer.Argument(metavar="IMAGE", help="Its name or id.", autocompletion=words.images)]


@command("image-create", IMAGES, example="hvsnap image-create s-mfrggzdfmztw debian-12")
def image_create(
    session: Session,
    snapshot: Snapshot,
    name: Annotated[str, typer.Argument(metavar="NAME", help="2 to 128 characters, first a letter.")],
    description: Annotated[str, typer.Option(metavar="TEXT", show_default=False, help="Up to 256 characters.")] = "",
) -> None:
    """Promote a snapshot of a system disk to an image: a template for new disks.

    The snapshot cannot be deleted as long as the image is there.
    """
    from hvsnap.cli import images

    images.create(session, snapshot, name, description)


@command("image-list", IMAGES, example="hvsnap image-list")
def image_list(session: Session) -> None:
    """List the images."""
    from hvsnap.cli import images

    images.listing(session)


@command("image-export", IMAGES, example="hvsnap image-export debian-12 /srv/templates/debian-12.qcow2")
def image_export(
    session: Session,
    image: Image,
    path: Annotated[str, typer.Argument(metavar="PATH", help="The new file; it must not exist.")],
    detach: Detach = False,
) -> int:
    """Write an image to a new file: a compressed qcow2 that any QEMU boots.

    The exit status says whether it was written. An existing file is never overwritten.
    """
    from hvsnap.cli import images

    return images.export(session, image, path, detach=detach)


@command("image-delete", IMAGES, example="hvsnap image-delete debian-12")
def image_delete(session: Session, image: Image) -> None:
    """Delete an image; its snapshot stays, and so do disks and files that were made of it."""
    from hvsnap.cli import images

    images.delete(session, image)
