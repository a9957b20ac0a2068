"""Comparison with the peers of the field, as ratios measured in one run: ``python -m bench``. Needs root."""
