"""Named recipes, a TOML file each; see `exporter.planning.recipe`."""
