"""Methods as they were published, for comparison: no runtime holds what they make."""
