"""Coded files: a runtime's file in fewer bytes, restored bit for bit."""
