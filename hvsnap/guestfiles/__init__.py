"""Files in a snapshot, by libguestfs: a small virtual machine reads the guest's file systems, never the host's kernel.

It is a process of its own (``python -m hvsnap.guestfiles``), which the command line starts, asks, and can end at any
moment, whatever libguestfs is waiting for.
"""
