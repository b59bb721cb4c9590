"""ARM64 programs on this machine: QEMU emulates one kind of core at a time."""
