"""The steps that recipes are made of, a file each, which holds `STEP`; see `exporter.planning.recipe`."""
