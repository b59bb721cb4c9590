"""ARM64 programs on this machine: QEMU runs their instructions, one kind of core at a time."""
