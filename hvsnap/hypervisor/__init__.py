"""Adapters to what runs guests: libvirt, QEMU's own tools."""
