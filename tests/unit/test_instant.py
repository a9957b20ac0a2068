"""How far apart instants can have been: never less than they were."""

from __future__ import annotations

from random import Random

from hvsnap.instant import Span, skew_ms


def test_instants_within_spans_are_never_further_apart_than_told() -> None:
    random = Random(7)
    for _ in range(500):
        begun = [random.uniform(1e5, 1e5 + 0.2) for _ in range(random.randint(1, 6))]
        spans = [Span(began_s, began_s + random.uniform(0, 0.1)) for began_s in begun]
        instants = [random.choice([span.began_s, span.ended_s]) for span in spans]
        assert (max(instants) - min(instants)) * 1000 <= skew_ms(spans)


def test_one_instant_is_apart_from_nothing_and_a_bound_is_rounded_up() -> None:
    assert skew_ms([]) == skew_ms([Span(1.0, 2.0)]) == 0.0
    assert skew_ms([Span(0.0, 0.25), Span(0.125, 0.5)]) == 500.0
    assert skew_ms([Span(0.0, 0.0), Span(0.0, 0.0000001)]) == 0.001
