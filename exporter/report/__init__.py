"""The report: what was measured and decided, as data for programs and as a page for people."""
