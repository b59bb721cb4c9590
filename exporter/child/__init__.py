"""Child processes without network and with resource limits, called through a pipe that transports only data."""
