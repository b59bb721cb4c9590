"""Families of decoders: one file each, named after `model_type`, which exports `FAMILY`."""
