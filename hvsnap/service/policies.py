"""Policies: making, changing, applying and cancelling them (SERVICE 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import BadRequest, PolicyUnknown, Refused
from hvsnap.hypervisor import images
from hvsnap.model import Disk, new_id
from hvsnap.policy import Keep, Policy, PolicyId, check_policy, next_due
from hvsnap.ports import Clock
from hvsnap.service.inventory import Inventory
from hvsnap.service.views import when


class Policies:
    """Keeps the policies, and which disk has which; a disk has at most one."""

    def __init__(self, catalog: Catalog, inventory: Inventory, clock: Clock, *, policies_max: int) -> None:
        self._catalog = catalog
        self._inventory = inventory
        self._clock = clock
        self._policies_max = policies_max

    async def listing(self) -> wire.PolicyList:
        """Return all policies, each with its disks, by name."""
        disks = await self._catalog.disks()
        return wire.PolicyList(policies=[self._view(one, disks) for one in await self._catalog.policies()])

    async def create(self, body: wire.PolicyCreate) -> wire.Policy:
        """Make a policy. Raises :class:`BadRequest`, :class:`Refused` for a name taken, or at the limit."""
        known = await self._catalog.policies()
        if len(known) >= self._policies_max:
            hint = "delete one, or raise limits.policies"
            raise Refused(f"there are {len(known)} policies already", hint=hint)
        policy = check_policy(
            Policy(
                id=PolicyId(new_id("p")),
                name=body.name,
                hours=tuple(body.hours),
                weekdays=tuple(body.weekdays),
                timezone=body.timezone,
                retain_days=body.retain_days,
                keep=_keep(body.keep),
                created_at=self._clock.now(),
            )
        )
        return await self._put(policy, known)

    async def edit(self, name: str, body: wire.PolicyEdit) -> wire.Policy:
        """Change a policy; snapshots that it has made keep what they carry (SERVICE 5.3)."""
        known = await self._catalog.policies()
        policy = pick_policy(known, name)
        given = body.model_dump(exclude_unset=True)
        if "keep" in given:
            given["keep"] = _keep(body.keep)
        for key in ("hours", "weekdays"):
            if key in given:
                given[key] = tuple(given[key])
        if not given:
            raise BadRequest("nothing was said to change", hint="give --hours, --retain-days, …")
        return await self._put(check_policy(replace(policy, **given)), known)

    async def delete(self, name: str) -> wire.Policy:
        """Remove a policy; its disks have none from then on, and their snapshots stay (SERVICE 5.5)."""
        policy = pick_policy(await self._catalog.policies(), name)
        view = self._view(policy, await self._catalog.disks())
        async with self._catalog.write() as tx:
            await tx.remove_policy(policy.id)
        return view

    async def apply(self, name: str, disks: Sequence[str]) -> wire.PolicyApplied:
        """Put disks under a policy, all of them or none; tells which had another one (SERVICE 5.2)."""
        known = await self._catalog.policies()
        policy = pick_policy(known, name)
        names = {one.id: one.name for one in known}
        found = [await self._inventory.find_attached(disk) for disk in dict.fromkeys(disks)]
        rows = []
        for one in found:
            info = await images.image_info(one.view.top.path, one.view.top.format)
            rows.append(await self._inventory.register(one, info.size_bytes))
        async with self._catalog.write() as tx:
            for row in rows:
                await tx.update_disk(row.id, policy=policy.id)
        others = [row for row in rows if row.policy not in (None, policy.id)]
        replaced = {str(row.id): names[PolicyId(str(row.policy))] for row in others}
        return wire.PolicyApplied(policy=policy.name, disks=[_disk(row) for row in rows], replaced=replaced)

    async def cancel(self, disks: Sequence[str]) -> wire.PolicyApplied:
        """Take disks out of their policies (SERVICE 5.5)."""
        names = {one.id: one.name for one in await self._catalog.policies()}
        rows = [await self._inventory.disk(disk) for disk in dict.fromkeys(disks)]
        for row in rows:
            if row.policy is None:
                hint = "`hvsnap policy-list` shows which disks have one"
                raise Refused(f"disk {row.guest_name}/{row.target} has no policy", hint=hint)
        async with self._catalog.write() as tx:
            for row in rows:
                await tx.update_disk(row.id, policy=None)
        replaced = {str(row.id): names[PolicyId(str(row.policy))] for row in rows}
        return wire.PolicyApplied(policy=None, disks=[_disk(row) for row in rows], replaced=replaced)

    async def _put(self, policy: Policy, known: Sequence[Policy]) -> wire.Policy:
        if any(one.name == policy.name and one.id != policy.id for one in known):
            raise Refused(f"there is a policy {policy.name} already", hint="choose another name")
        async with self._catalog.write() as tx:
            await tx.put_policy(policy)
        return self._view(policy, await self._catalog.disks())

    def _view(self, policy: Policy, disks: Sequence[Disk]) -> wire.Policy:
        mine = [disk for disk in disks if disk.policy == policy.id]
        return wire.Policy(
            id=policy.id,
            name=policy.name,
            hours=list(policy.hours),
            weekdays=list(policy.weekdays),
            timezone=policy.timezone,
            retain_days=policy.retain_days,
            keep=wire.PolicyKeep(**asdict(policy.keep)),
            next_run=when(next_due(policy, self._clock.now())) if mine else None,
            disks=[_disk(disk) for disk in mine],
        )


def pick_policy(policies: Sequence[Policy], name: str) -> Policy:
    """Return the policy of that id or name. Raises :class:`PolicyUnknown`."""
    for policy in policies:
        if name in (policy.id, policy.name):
            return policy
    raise PolicyUnknown(f"there is no policy {name[:128]}")


def _keep(given: wire.PolicyKeep | None) -> Keep:
    return Keep() if given is None else Keep(**given.model_dump())


def _disk(disk: Disk) -> wire.PolicyDisk:
    return wire.PolicyDisk(id=disk.id, guest=disk.guest_name, target=disk.target)
