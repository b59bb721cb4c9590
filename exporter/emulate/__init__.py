"""Emulation of a device on this machine: its instructions under QEMU, its limits on a process."""
