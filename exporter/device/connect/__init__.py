"""Real devices: a connection, a folder on the device, and its identity. One file per transport."""
