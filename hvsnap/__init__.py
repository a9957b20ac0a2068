"""hvsnap: cloud-grade disk snapshots for your own KVM hosts."""

__version__ = "0.1.0"
