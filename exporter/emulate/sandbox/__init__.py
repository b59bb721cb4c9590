"""A process under a device's limits: memory, cores, CPU share and time."""
