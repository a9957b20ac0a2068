"""What can be typed about policies and locks."""
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

from hvsnap.cli import words
from hvsnap.cli.grammar.command import SNAPSHOTS, Snapshot, command, flag
from hvsnap.cli.session import Session

POLICIES = "Policies"

Policy = Annotated[str, typer.Argument(metavar="POLICY", help="Its name or id.", autocompletion=words.policies)]
Disks = Annotated[
    list[str],
    typer.Argument(metavar="DISK", help="GUEST/TARGET, an id or a path.", autocompletion=words.attached_disks),
]
Hours = Annotated[str, typer.Option(metavar="LIST", show_default=False, help="Hours of the day: 0,6,12 or 8-18.")]
Weekdays = Annotated[str, typer.Option(metavar="LIST", show_default=False, help="mon-fri, sat,sun or daily.")]
Timezone = Annotated[
    str, typer.Option(metavar="ZONE", show_default=False, help="Such as Europe/Berlin; else the host's.")
]
RetainDays = Annotated[
    str, typer.Option(metavar="DAYS", show_default=False, help="How long snapshots stay: 1 to 65536, or forever.")
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PERIOD=N", help="Instead of days: last=N, hourly=N, daily=N, weekly=N, monthly=N; may be repeated."
    ),
]


@command("snapshot-edit", SNAPSHOTS, example='hvsnap snapshot-edit s-mfrggzdfmztw --name "before upgrade"')
def snapshot_edit(
    session: Session,
    snapshot: Snapshot,
    name: Annotated[str, typer.Option(metavar="NAME", show_default=False, help="A new name.")] = "",
    description: Annotated[
        str | None, typer.Option(metavar="TEXT", show_default=False, help="A new description.")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Tags in the place of those it has.")
    ] = None,
    usual: Annotated[bool, flag("--usual", help="What is unusual about it is all right: its alarm is over.")] = False,
) -> None:
    """Change a snapshot's name, description or tags, or end an alarm about it."""
    from hvsnap.cli import policies

    policies.edit_snapshot(session, snapshot, name, description, tag, usual=usual)


@command("snapshot-lock", SNAPSHOTS, example="hvsnap snapshot-lock s-mfrggzdfmztw --until 2027-01-31")
def snapshot_lock(
    session: Session,
    snapshot: Snapshot,
    until: Annotated[str, typer.Option(metavar="DATE", help="2027-01-31 (the whole day), or 2027-01-31T18:00.")],
) -> None:
    """Lock a snapshot against deletion until a date.

    Nobody can delete it before, and the lock can only be made longer.
    """
    from hvsnap.cli import policies

    policies.lock(session, snapshot, until)


@command(
    "policy-create", POLICIES, example="hvsnap policy-create nightly --hours 2 --weekdays mon-fri --retain-days 30"
)
def policy_create(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="2 to 128 characters, first a letter.")],
    hours: Hours,
    weekdays: Weekdays = "",
    timezone: Timezone = "",
    retain_days: RetainDays = "",
    keep: Keep = None,
) -> None:
    """Make a policy for automatic snapshots.

    Each hour on each weekday makes a snapshot of every disk that has the policy. They stay for 30 days unless said
    otherwise.
    """
    from hvsnap.cli import policies

    fields = policies.policy_fields(
        hours=hours, weekdays=weekdays, timezone=timezone, retain_days=retain_days, keep=keep or []
    )
    policies.create(session, name, fields)


@command("policy-list", POLICIES, example="hvsnap policy-list")
def policy_list(session: Session) -> None:
    """List the policies: when each runs, how long its snapshots stay, and which disks have it."""
    from hvsnap.cli import policies

    policies.listing(session)


@command("policy-edit", POLICIES, example="hvsnap policy-edit nightly --hours 2,14")
def policy_edit(
    session: Session,
    policy: Policy,
    name: Annotated[str, typer.Option(metavar="NAME", show_default=False, help="A new name.")] = "",
    hours: Hours = "",
    weekdays: Weekdays = "",
    timezone: Timezone = "",
    retain_days: RetainDays = "",
    keep: Keep = None,
) -> None:
    """Change a policy; snapshots that it has made keep what they were made with."""
    from hvsnap.cli import policies

    fields = policies.policy_fields(
        hours=hours, weekdays=weekdays, timezone=timezone, retain_days=retain_days, keep=keep or [], name=name
    )
    policies.edit(session, policy, fields)


@command("policy-delete", POLICIES, example="hvsnap policy-delete nightly")
def policy_delete(session: Session, policy: Policy) -> None:
    """Delete a policy; its disks have none from then on, and their snapshots stay."""
    from hvsnap.cli import policies

    policies.delete(session, policy)


@command("policy-apply", POLICIES, example="hvsnap policy-apply nightly web01/vda db01/vda")
def policy_apply(session: Session, policy: Policy, disks: Disks) -> None:
    """Put disks under a policy, in the place of the one that each may have."""
    from hvsnap.cli import policies

    policies.apply(session, policy, disks)


@command("policy-cancel", POLICIES, example="hvsnap policy-cancel web01/vda")
def policy_cancel(session: Session, disks: Disks) -> None:
    """Take disks out of their policies; their snapshots stay."""
    from hvsnap.cli import policies

    policies.cancel(session, disks)
