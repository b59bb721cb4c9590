"""Targets: one file or folder each; the name is the target's name on the command line."""
