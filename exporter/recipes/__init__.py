"""Named recipes, a TOML file each; see `exporter.plan.recipe`."""
