"""Coded files: a runtime's own file in fewer bytes, restored bit by bit."""
