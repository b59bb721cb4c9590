"""The cores that work may be spread over."""

import os
import sys


def available_cores() -> int:
    """Return how many cores this process may run on: a container or `taskset` may hold it to fewer than there are."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
