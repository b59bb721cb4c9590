"""Compression: one file a method."""
