"""Methods as published, for comparison; no runtime supports their results."""
