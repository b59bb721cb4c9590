"""Device profiles, one TOML file a device; read with `exporter.device.profile.load_device`."""
