"""The way back: from snapshots to disks."""
