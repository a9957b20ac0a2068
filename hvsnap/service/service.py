"""All use cases in one value: what the API is built over."""

from __future__ import annotations

from dataclasses import dataclass

from hvsnap.service.chains import Chains
from hvsnap.service.disks import Disks
from hvsnap.service.doctor import Doctor
from hvsnap.service.drills import Drills
from hvsnap.service.feed import Feed
from hvsnap.service.guests import Guests
from hvsnap.service.hooks import Hooks
from hvsnap.service.images import Images
from hvsnap.service.known_disks import KnownDisks
from hvsnap.service.policies import Policies
from hvsnap.service.recovery import Recovery
from hvsnap.service.requests import CapturesPort
from hvsnap.service.rollbacks import Rollbacks
from hvsnap.service.serving import Serving
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.status import StatusBoard
from hvsnap.service.store import Store
from hvsnap.service.tasks import Tasks
from hvsnap.service.usage import UsageReports


@dataclass(frozen=True, slots=True)
class Service:
    """The rooms of the service, put together by the daemon."""

    guests: Guests
    snapshots: Snapshots
    captures: CapturesPort
    chains: Chains
    policies: Policies
    disks: Disks
    known_disks: KnownDisks
    rollbacks: Rollbacks
    images: Images
    store: Store
    drills: Drills
    usage: UsageReports
    tasks: Tasks
    doctor: Doctor
    recovery: Recovery
    status: StatusBoard
    feed: Feed
    hooks: Hooks
    serving: Serving
