"""What a capture will not read is given back, and nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvsnap.capture import giveback
from hvsnap.capture.blockset import BlockSet
from hvsnap.capture.plan import Selection
from hvsnap.model import PAGE_BLOCKS


def a_set(blocks: int, members: set[int]) -> BlockSet:
    made = BlockSet(blocks)
    for number in {member // PAGE_BLOCKS for member in members}:
        index = [member % PAGE_BLOCKS for member in members if member // PAGE_BLOCKS == number]
        made.add_index(number, np.array(sorted(index), np.uint16))
    return made


def given_back(selection: Selection) -> list[int]:
    ranges = giveback.unread_ranges(selection).tolist()
    assert all(blocks > 0 for _first, blocks in ranges)
    assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(ranges))  # none meets the next
    return [block for first, blocks in ranges for block in range(first, first + blocks)]


sizes = st.integers(1, 3 * PAGE_BLOCKS)


@given(sizes, st.data())
def test_exactly_the_blocks_that_are_not_read(blocks: int, data: st.DataObject) -> None:
    edges = {0, blocks - 1, PAGE_BLOCKS - 1, PAGE_BLOCKS, 2 * PAGE_BLOCKS}
    some = st.sets(st.sampled_from(sorted(edge for edge in edges if edge < blocks)) | st.integers(0, blocks - 1))
    holds = data.draw(some)
    candidates = data.draw(st.none() | some)
    selection = Selection(a_set(blocks, holds), None if candidates is None else a_set(blocks, candidates))
    read = holds if candidates is None else holds & candidates
    assert given_back(selection) == sorted(set(range(blocks)) - read)


def test_of_too_many_ranges_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giveback, "RANGES_MAX", 3)
    blocks = 3 * PAGE_BLOCKS
    gaps = [range(100, 190), range(4000, 4400), range(9000, 9050)]  # the second lies across two pages
    read = {block for block in range(blocks) if block % 3 == 0 and not any(block in gap for gap in gaps)}
    ranges = giveback.unread_ranges(Selection(a_set(blocks, read), None)).tolist()
    assert [first for first, _blocks in ranges] == [100, 4000, 8998]
    assert all(not read & set(range(first, first + length)) for first, length in ranges)
