"""Weight formats: how a runtime stores and decodes a matrix."""
