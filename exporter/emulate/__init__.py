"""A device on this machine: its instructions under QEMU, its limits around a process."""
