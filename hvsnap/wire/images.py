"""Images: templates for new disks."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from hvsnap.wire.base import Answer, Name, Request


class ImageCreate(Request):
    """Promote a snapshot of a system disk to an image (SERVICE 7.4)."""

    snapshot: Name
    name: str = Field(max_length=4096)
    description: str = Field(default="", max_length=65536)


class ImageExport(Request):
    """Write an image to a new file, a compressed qcow2. ``path`` is absolute, and must not exist."""

    path: Name


class Image(Answer):
    """A snapshot of a system disk that is a template for new disks."""

    id: str = Field(examples=["i-mfrggzdfmztw"])
    name: str
    description: str
    snapshot: str = Field(description="what it is made of; it stays as long as the image is there")
    disk: str = Field(description="of the snapshot")
    guest: str
    target: str
    size_bytes: int
    created_at: AwareDatetime


class ImageList(Answer):
    """All images, by name."""

    images: list[Image]


class ImageExported(Answer):
    """What became of an ImageExport."""

    kind: Literal["image-export"] = "image-export"
    image: str
    snapshot: str
    path: str
    size_bytes: int = Field(description="of the disk that it holds")
    written_bytes: int
    file_bytes: int = Field(description="size of the file")
