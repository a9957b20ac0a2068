"""The oracle itself: it finds the instant of a log, and no instant where there is none."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from tests.e2e.oracle import BLOCK, SECTOR, Bytes, Mismatch, Operation, Replica, instant_in_log

SIZE = 20 * BLOCK + 3 * SECTOR


def a_log(random: Random) -> tuple[list[Operation], list[Bytes]]:
    """Return writes of whole sectors, none like another, and what a disk holds before the first and after each."""
    replica, log, states = Replica(np.zeros(SIZE, np.uint8)), [], [np.zeros(SIZE, np.uint8)]
    for _ in range(60):
        length = random.randrange(1, 200) * SECTOR
        offset = random.randrange((SIZE - length) // SECTOR + 1) * SECTOR
        log.append(Operation("write", offset, length, np.frombuffer(random.randbytes(length), np.uint8)))
        replica.apply(log[-1])
        states.append(replica.data.copy())
    return log, states


@pytest.mark.parametrize("seed", range(5))
def test_every_instant_of_a_log_is_found(seed: int) -> None:
    log, states = a_log(Random(seed))
    assert [instant_in_log(state, states[0], log) for state in states] == list(range(len(states)))


@pytest.mark.parametrize("seed", range(5))
def test_operation_under_way_may_be_there_in_part(seed: int) -> None:
    random = Random(seed)
    log, states = a_log(random)
    for number, one in enumerate(log):
        half = states[number].copy()
        middle = one.offset + one.length // SECTOR // 2 * SECTOR
        half[middle : one.stop] = states[number + 1][middle : one.stop]
        assert instant_in_log(half, states[0], log) in (number, number + 1)


@pytest.mark.parametrize("seed", range(5))
def test_earlier_or_later_sectors_are_no_instant(seed: int) -> None:
    random = Random(seed)
    log, states = a_log(random)
    log += [Operation("write", 0, SIZE, np.frombuffer(random.randbytes(SIZE), np.uint8))]
    states += [np.asarray(log[-1].data)]
    for number in random.sample(range(5, 55), 5):
        for other in (states[-1], np.full(SIZE, 0x11, np.uint8)):
            mixed = states[number].copy()
            at = random.randrange(SIZE // SECTOR) * SECTOR
            mixed[at : at + SECTOR] = other[at : at + SECTOR]
            with pytest.raises(Mismatch):
                instant_in_log(mixed, states[0], log)
