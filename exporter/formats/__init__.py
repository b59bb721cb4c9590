"""Weight formats: how a runtime stores a matrix, and what it multiplies with."""
