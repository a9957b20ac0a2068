"""A rollback that a full device has stopped is tried less and less often, and at once when there is a reason to."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvsnap.errors import HvsnapError, NoSpace, StoreFailed
from hvsnap.guard import StartGuard
from hvsnap.model import GuestUuid, OperationId
from hvsnap.restore import target
from hvsnap.service.patience import PAUSE_S_FIRST, PAUSE_S_MAX, ROOM_BYTES, Patience
from hvsnap.service.recovery import RestoreRecovery
from hvsnap.service.uses import Uses
from tests.api_kit import FakeMaker, FakeRoller
from tests.catalog_kit import StoppedClock, a_disk, add_chain
from tests.service_kit import a_catalog

ONE, OTHER = OperationId("o-one"), OperationId("o-other")


def test_pauses_grow_to_their_limit_and_are_forgotten() -> None:
    patience, now, pauses = Patience(), 0.0, []
    for _ in range(8):
        patience.note(ONE, now, 0)
        began = now
        while not patience.is_due(ONE, now, 0):
            now += PAUSE_S_FIRST / 2
        pauses.append(now - began)
    assert pauses[:4] == [PAUSE_S_FIRST, 2 * PAUSE_S_FIRST, 4 * PAUSE_S_FIRST, 8 * PAUSE_S_FIRST]
    assert pauses[-2:] == [PAUSE_S_MAX, PAUSE_S_MAX]
    patience.note(ONE, now, 0)
    assert patience.is_due(OTHER, now, 0)
    patience.forget(ONE)
    assert patience.is_due(ONE, now, 0)
    patience.note(ONE, now, 0)
    assert patience.is_due(ONE, now + PAUSE_S_FIRST, 0)


def test_more_room_ends_a_pause_and_less_does_not() -> None:
    patience = Patience()
    patience.note(ONE, 0.0, 5 * ROOM_BYTES)
    assert not patience.is_due(ONE, 1.0, 0)
    assert not patience.is_due(ONE, 1.0, 6 * ROOM_BYTES)
    assert patience.is_due(ONE, 1.0, 6 * ROOM_BYTES + 1)


@pytest.mark.parametrize("error", [NoSpace("the device is full"), StoreFailed("the store is away")])
async def test_a_stopped_rollback_is_left_alone_by_time_and_by_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: HvsnapError
) -> None:
    clock, free = StoppedClock(), [0]
    monkeypatch.setattr(target, "free_bytes", lambda _path: free[0])
    async with a_catalog(tmp_path, clock) as catalog:
        roller = FakeRoller(catalog, [])
        restores = RestoreRecovery(catalog, FakeMaker(catalog), roller, Uses(), StartGuard(tmp_path), clock)
        disk = a_disk()
        (snapshot,) = await add_chain(catalog, disk, {0: {0: 1}})
        async with catalog.write() as tx:
            facts = {"disk": disk.id, "snapshot": snapshot}
            await tx.open_operation("rollback", GuestUuid(disk.guest_uuid), "writing", facts)
        roller.error = error
        assert len(await restores.retry()) == 1  # the first try after it has stopped
        again = 0 if isinstance(error, NoSpace) else 1
        assert len(await restores.retry()) == again
        assert len(await restores.recover()) == 1  # a user, or a guest that has stopped
        assert len(await restores.retry()) == again
        free[0] += 2 * ROOM_BYTES
        assert len(await restores.retry()) == 1
        assert len(await restores.retry()) == again
        clock.at += 4 * PAUSE_S_FIRST
        assert len(await restores.retry()) == 1
        roller.error = None
        clock.at += PAUSE_S_MAX
        ((_operation, why),) = await restores.retry()
        assert why is None
        assert await catalog.operations() == []
