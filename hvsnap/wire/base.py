"""What every request and answer is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from hvsnap.errors import HvsnapError

API = "/v1"


Name = Annotated[str, Field(max_length=4096)]
"""Something that names a guest, a disk or a snapshot. What it may be is judged where it is looked up."""


Instant = AwareDatetime
"""A moment, with its time zone."""


class Answer(BaseModel):
    """Base of what the daemon sends.

    Built when it is first used: a command needs two of these models, and all of them take 60 ms.
    """

    model_config = ConfigDict(frozen=True, defer_build=True)


class Request(BaseModel):
    """Base of what the daemon is sent; an unknown key is an error, so that a misspelt one is never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Error(Answer):
    """Why a request did not succeed, in one line, and the next step."""

    code: str = Field(description="stable, machine-readable", examples=["snapshot-unknown"])
    message: str
    hint: str = Field(description="the next step; may be empty")
    exit_status: int = Field(description="what the command line exits with", ge=1, le=7)

    @classmethod
    def of(cls, error: HvsnapError) -> Error:
        """Return the body that tells of ``error``."""
        return cls(code=error.code, message=error.message, hint=error.hint, exit_status=error.exit_status)


def build() -> None:
    """Build all models now: for the daemon, whose first answer should not wait for it."""
    waiting: list[type[BaseModel]] = [Answer, Request]
    while waiting:
        model = waiting.pop()
        # What FastAPI derives from a model would be deferred, too, and built outside of its filter of warnings.
        model.model_config["defer_build"] = False
        model.model_rebuild()
        waiting += model.__subclasses__()
