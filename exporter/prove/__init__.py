"""Validation: accuracy, speed, memory and parity of an artifact in its own runtime."""
