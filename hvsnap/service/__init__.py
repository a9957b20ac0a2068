"""The rules: the only place that knows names, quotas and states (docs/service.md)."""
