"""Sets and counts of block ids against Python's own."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvsnap.store.idset import PIECE_IDS, IdCounts, IdSet

ids = st.one_of(st.integers(0, 40), st.integers(PIECE_IDS - 3, PIECE_IDS + 3), st.integers(0, 2**40))
lists = st.lists(ids, max_size=30)


def array(numbers: list[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(numbers, np.uint64)


@given(st.lists(lists, max_size=4), lists)
def test_a_set_of_ids_is_a_set_without_zero(parts: list[list[int]], asked: list[int]) -> None:
    found, other = IdSet(), IdSet()
    for number, part in enumerate(parts):
        (found if number % 2 else other).add(array(part))
    found.update(other)
    expected = {number for part in parts for number in part} - {0}
    assert len(found) == len(expected)
    assert found.array().tolist() == sorted(expected)
    assert found.has(array(asked)).tolist() == [number in expected for number in asked]
    assert all((number in found) == (number in expected) for number in asked)


@given(lists, st.integers(0, 70))
def test_ids_are_counted_range_by_range(numbers: list[int], eighth: int) -> None:
    start = eighth * 512
    expected = sum(start <= number < start + 512 for number in set(numbers) - {0})
    assert IdSet(array(numbers)).count(start, start + 512) == expected


@given(st.lists(lists, max_size=4), lists)
def test_ids_are_counted_as_often_as_they_were_added(parts: list[list[int]], asked: list[int]) -> None:
    counts = IdCounts()
    for part in parts:
        counts.add(array(part))
    expected = Counter(number for part in parts for number in part)
    assert counts.of(array(asked)).tolist() == [expected[number] for number in asked]
