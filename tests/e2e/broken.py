"""Faults of the product, for tests that show that other tests would see them."""

from __future__ import annotations

from collections.abc import Callable

FAULTS: dict[str, Callable[[], None]] = {}
