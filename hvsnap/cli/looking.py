"""Commands that only look: one call, one answer."""

from __future__ import annotations

from hvsnap import wire
from hvsnap.cli import render
from hvsnap.cli.client import place
from hvsnap.cli.session import Session


def guests(session: Session) -> None:
    """Show the guests and their disks."""
    with session.client() as client:
        answer = client.get("/guests", wire.GuestList)
    session.answer(answer, render.guests(answer, headers=not session.quiet))


def chains(session: Session) -> None:
    """Show the chains."""
    with session.client() as client:
        answer = client.get("/chains", wire.ChainList)
    session.answer(answer, render.chains(answer, headers=not session.quiet))


def chain(session: Session, disk: str) -> None:
    """Show one chain with its nodes."""
    with session.client() as client:
        answer = client.get(place("chains", disk), wire.Chain)
    session.answer(answer, render.chain(answer))


def status(session: Session) -> None:
    """Show the daemon at a glance."""
    with session.client() as client:
        answer = client.get("/status", wire.Status)
    session.answer(answer, render.status(answer))
