"""Names as levels of topics, pauses between attempts: the pure parts."""

from __future__ import annotations

from urllib.parse import unquote

from hypothesis import given
from hypothesis import strategies as st

from hvsnap.mqtt.backoff import Backoff
from hvsnap.mqtt.topics import Topics, level


@given(st.text())
def test_a_level_holds_any_name_and_gives_it_back(name: str) -> None:
    escaped = level(name)
    assert unquote(escaped) == name
    assert not set(escaped) & set("/+#\0")
    assert not escaped.startswith("$")
    assert all(ord(character) > 0x1F and not 0x7F <= ord(character) <= 0x9F for character in escaped)
    assert not any(0xFFFE <= ord(character) & 0xFFFF <= 0xFFFF for character in escaped)


@given(st.text(), st.text())
def test_different_names_are_different_levels(one: str, other: str) -> None:
    assert (level(one) == level(other)) == (one == other)


def test_names_that_are_no_text_can_be_published_all_the_same() -> None:
    assert level("a\udcff") == "a%FF"  # a byte that was no UTF-8
    level("\ud800").encode()


def test_ordinary_names_stay_readable() -> None:
    topics = Topics("site/hvsnap", "kvm-1.example.org")
    assert topics.status == "site/hvsnap/kvm-1.example.org/status"
    assert topics.progress("s-mfrggzdfmztw") == "site/hvsnap/kvm-1.example.org/snapshot/s-mfrggzdfmztw/progress"
    assert topics.progress("t-mfrggzdfmztw") == "site/hvsnap/kvm-1.example.org/task/t-mfrggzdfmztw/progress"
    assert topics.disk_state("Büro 1", "d-x") == "site/hvsnap/kvm-1.example.org/guest/Büro 1/disk/d-x/state"
    assert level("a$b") == "a$b"


def test_pauses_double_up_to_the_longest_and_start_anew() -> None:
    backoff = Backoff(1.0, 60.0, dice=lambda: 0.0)
    assert [backoff.pause_s() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff.long_pause_s() == 60
    backoff.reset()
    assert backoff.pause_s() == 1


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 20))
def test_the_dice_cut_at_most_half_of_a_pause(thrown: float, attempts: int) -> None:
    even, cut = Backoff(1.0, 60.0, dice=lambda: 0.0), Backoff(1.0, 60.0, dice=lambda: thrown)
    for _ in range(attempts):
        longest, pause_s = even.pause_s(), cut.pause_s()
        assert longest / 2 <= pause_s <= longest
