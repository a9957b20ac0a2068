"""A snapshot in use is not deleted, one being deleted is not used, and a disk has one user (SERVICE 4.6)."""

import pytest

from hvsnap.errors import Busy, SnapshotInUse
from hvsnap.model import DiskId, SnapshotId
from hvsnap.service.uses import Uses

A, B = SnapshotId("s-a"), SnapshotId("s-b")


def test_a_snapshot_in_use_cannot_be_deleted_and_the_error_names_the_use() -> None:
    uses = Uses()
    with uses.hold_snapshot(A, "being restored to /x"), uses.hold_snapshot(A, "being restored to /y"):
        with pytest.raises(SnapshotInUse, match="s-a is being restored to /x"), uses.hold_for_deletion([B, A]):
            pass
        with uses.hold_for_deletion([B]):  # the refusal before holds nothing
            pass
    with uses.hold_for_deletion([A, B]):
        pass


def test_a_snapshot_being_deleted_cannot_be_used_nor_deleted_twice() -> None:
    uses = Uses()
    with uses.hold_for_deletion([A]):
        with pytest.raises(SnapshotInUse, match="being deleted"), uses.hold_snapshot(A, "being restored"):
            pass
        with pytest.raises(SnapshotInUse, match="being deleted"), uses.hold_for_deletion([A]):
            pass
        with pytest.raises(SnapshotInUse, match="being deleted"), uses.hold_snapshot(A, "being restored"):
            pass
    with uses.hold_snapshot(A, "being restored"):
        pass


def test_a_disk_has_one_user_at_a_time_also_after_an_error() -> None:
    uses = Uses()
    disk = DiskId("d-1")

    def fail_while_holding() -> None:
        with uses.hold_disk(disk, "being rolled back"):
            with pytest.raises(Busy, match="d-1 is being rolled back"):
                uses.check_disk(disk)
            with pytest.raises(Busy), uses.hold_disk(disk, "being rolled back"):
                pass
            with pytest.raises(Busy):  # the refusal before let nothing go
                uses.check_disk(disk)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_holding()
    uses.check_disk(disk)
